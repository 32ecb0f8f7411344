"""Structured output of the default model over HTTP, through the official client."""

import json
import re

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
pytestmark = pytest.mark.model
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "Describe a person as JSON."}]


def test_answers_have_the_form_that_was_asked_for(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        ask = client.chat.completions.create
        options = {"model": "smollm2", "messages": MESSAGES, "max_tokens": 60}
        schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
        for temperature in (0, 1.5):
            answer = ask(**options, temperature=temperature, response_format=schema, seed=1)
            person = json.loads(answer.choices[0].message.content)
            assert set(person) == {"name", "age"}
            assert 1 <= person["age"] <= 99
            assert answer.choices[0].finish_reason == "stop"
        stream = ask(**options, response_format=schema, stream=True, temperature=0)
        assert set(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in stream))) == {"name", "age"}
        for structure, pattern in (
            ({"choice": ["red", "green"]}, "red|green"),
            ({"regex": "[0-9]{3}-[0-9]{4}"}, "[0-9]{3}-[0-9]{4}"),
            ({"grammar": 'start: "<" /[a-z]{1,5}/ ">"'}, "<[a-z]{1,5}>"),
        ):
            answer = ask(**options, extra_body={"structured_outputs": structure})
            assert re.fullmatch(pattern, answer.choices[0].message.content)
        with pytest.raises(openai.BadRequestError, match="no grammar can be built") as caught:
            ask(**options, extra_body={"structured_outputs": {"regex": "("}})
        assert caught.value.param == "structured_outputs"
