"""The official client against `octavo serve` with the default model: chat, completions, streams, logprobs, stop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest

pytestmark = pytest.mark.model

MODEL = "smollm2"
MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
GREEDY = {"model": MODEL, "temperature": 0}
STORY = {**GREEDY, "prompt": "Once upon a time, there was a", "max_tokens": 12}


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_models_name_what_is_served(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).max_model_len == 2048


def test_chat_answers_the_question(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY, messages=MESSAGES, max_tokens=40)
    choice = answer.choices[0]
    assert "Paris" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens < 40
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_stream_says_the_same(client: openai.OpenAI) -> None:
    request = {**GREEDY, "messages": MESSAGES, "max_tokens": 40}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_completion_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(**STORY)
    chunks = list(client.completions.create(**STORY, stream=True))
    assert len(chunks) > 6, "it came in pieces"
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"


def test_characters_of_several_tokens_stream_whole(client: openai.OpenAI) -> None:
    prompt = "日本語のテキスト: こんにちは、世界。 Emoji: 🙂🙃🙂🙃🙂🙃"
    request = {**GREEDY, "prompt": prompt, "max_tokens": 16}
    whole = client.completions.create(**request).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert "".join(pieces) == whole


def test_chat_logprobs_are_those_of_a_greedy_choice(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**GREEDY, messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    assert "".join(entry.token for entry in entries).startswith(answer.choices[0].message.content)
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        ordered = [other.logprob for other in entry.top_logprobs]
        assert len(ordered) == 3
        assert ordered == sorted(ordered, reverse=True)
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == ordered[0] <= 0


def test_completion_logprobs(client: openai.OpenAI) -> None:
    choice = client.completions.create(**STORY, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    for token, logprob, top, offset in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset, strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert choice.text[offset:].startswith(token)


def test_stop_string_across_tokens(client: openai.OpenAI) -> None:
    text = client.completions.create(**STORY).choices[0].text
    stop = text[len(text) // 2 :][:5]
    stopped = client.completions.create(**STORY, stop=stop)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 12
    streamed = client.completions.create(**STORY, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.choices[0].text


def test_several_prompts_answer_like_each_alone(client: openai.OpenAI) -> None:
    prompts = ["The sun is", "def add(a, b):", "Water boils at"]
    together = client.completions.create(**GREEDY, prompt=prompts, max_tokens=8)
    alone = [client.completions.create(**GREEDY, prompt=prompt, max_tokens=8).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_async_clients_at_once(server) -> None:
    async def story(client: openai.AsyncOpenAI) -> str:
        stream = await client.completions.create(**STORY, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", timeout=60) as client:
            return await asyncio.gather(*(story(client) for _ in range(8)))

    assert len(set(asyncio.run(main()))) == 1


def test_what_is_wrong_has_the_client_s_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 2048)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(**STORY, extra_body={"mirostat": 2})
    assert (unknown.value.code, unknown.value.param) == ("unsupported_parameter", "mirostat")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="a")


def test_echo_tells_what_generating_told(client: openai.OpenAI) -> None:
    first = client.completions.create(**STORY, logprobs=1, extra_body={"return_token_ids": True}).choices[0]
    ids = [*first.prompt_token_ids, *first.token_ids]
    again = client.completions.create(**{**GREEDY, "prompt": ids, "max_tokens": 1}, echo=True, logprobs=1).choices[0]
    told = again.logprobs.token_logprobs
    assert told[0] is None
    assert told[len(first.prompt_token_ids) : len(ids)] == pytest.approx(first.logprobs.token_logprobs, abs=1e-4)
    assert again.logprobs.tokens[:-1][-12:] == first.logprobs.tokens
    alone = client.completions.create(**{**GREEDY, "prompt": ids, "max_tokens": 0}, echo=True, logprobs=1).choices[0]
    assert alone.logprobs.token_logprobs == told[:-1]
    assert again.text.startswith(alone.text)


def test_embeddings_tell_alike_from_unlike(client: openai.OpenAI) -> None:
    texts = ["The cat sleeps on the sofa.", "A cat is sleeping on the couch.", "Interest rates rose by two per cent."]
    answer = client.embeddings.create(model=MODEL, input=texts, extra_body={"pooling": "mean"})
    one, alike, unlike = (entry.embedding for entry in answer.data)
    assert sum(x * x for x in one) == pytest.approx(1.0, abs=1e-3)
    assert sum(x * y for x, y in zip(one, alike, strict=True)) > sum(x * y for x, y in zip(one, unlike, strict=True))


def test_a_response_is_what_a_chat_says_and_goes_on(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(**GREEDY, messages=MESSAGES, max_tokens=40)
    asked = {**GREEDY, "input": MESSAGES[0]["content"], "max_output_tokens": 40}
    whole = client.responses.create(**asked)
    assert whole.status == "completed"
    assert whole.output_text == chat.choices[0].message.content
    with client.responses.stream(**asked) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "".join(pieces) == whole.output_text
    assert client.responses.retrieve(whole.id).output_text == whole.output_text
    further = client.responses.create(
        **GREEDY, input="And of Spain?", previous_response_id=whole.id, max_output_tokens=40
    )
    assert further.usage.input_tokens > whole.usage.total_tokens, "it reads what was said before"


def test_a_call_is_streamed_as_it_is_written(client: openai.OpenAI) -> None:
    properties = {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema, "strict": True}}]
    request = {**GREEDY, "messages": MESSAGES, "tools": tools, "tool_choice": "required", "max_tokens": 80}
    whole = client.chat.completions.create(**request).choices[0]
    with client.chat.completions.stream(**request) as events:
        kind = "tool_calls.function.arguments.delta"
        deltas = [event.arguments_delta for event in events if event.type == kind]
        streamed = events.get_final_completion().choices[0]
    assert whole.finish_reason == streamed.finish_reason == "tool_calls"
    assert len(deltas) > 3
    calls = [[call.function.arguments for call in choice.message.tool_calls] for choice in (whole, streamed)]
    assert calls[0] == calls[1]
    assert json.loads(calls[0][0])["city"] in ("Paris", "Rome")
