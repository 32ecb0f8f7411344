"""/v1/responses through the official client: items, events in their order, what is stored, tools, formats, refusals."""

from __future__ import annotations

import json

import openai
import pytest
from fake_engine import HERMES_CALL, FakeEngine
from inside import Inside
from live_server import Server

from octavo.server import responses
from octavo.server.keys import KeyEntry, Keyring
from octavo.server.tools import TOOL_PARSERS

PATH = "/v1/responses"
ASK = {"model": "fake", "input": "hi", "max_output_tokens": 4}
TOOL = {"type": "function", "name": "time", "parameters": {"type": "object"}, "strict": None}


def test_a_response(shared: Server) -> None:
    answer = shared.client.responses.create(**ASK, instructions="Be brief.", metadata={"a": "b"})
    assert answer.id.startswith("resp_")
    assert (answer.object, answer.status) == ("response", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert len(answer.output_text) == answer.usage.output_tokens == 4
    assert answer.output[0].role == "assistant"
    assert answer.instructions == "Be brief."
    prompt = shared.engine.tokenizer.decode(shared.engine.seen[-1].prompt)
    assert prompt == "<system>Be brief.\n<user>hi\n<assistant>"
    assert answer.usage.input_tokens == len(prompt)
    assert shared.client.responses.retrieve(answer.id).model_dump() == answer.model_dump()


def test_the_stream_is_what_the_client_puts_together(serve) -> None:
    server = serve(FakeEngine(answer=b"wxyz"))
    with server.client.responses.stream(model="fake", input="hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == [f"response.{k}" for k in ("created", "in_progress", "output_item.added", "content_part.added")]
    assert kinds[4:8] == ["response.output_text.delta"] * 4
    ends = ("output_text.done", "content_part.done", "output_item.done", "completed")
    assert kinds[8:] == [f"response.{kind}" for kind in ends]
    assert [event.sequence_number for event in events] == list(range(12))
    assert "".join(event.delta for event in events[4:8]) == events[8].text == final.output_text == "wxyz"
    assert server.client.responses.retrieve(final.id).output_text == final.output_text
    cut = list(server.client.responses.create(model="fake", input="hi", max_output_tokens=2, stream=True))
    assert cut[-1].type == "response.incomplete"


def test_a_conversation_goes_on(shared: Server) -> None:
    first = shared.client.responses.create(**ASK, instructions="forgotten next time")
    shared.client.responses.create(**{**ASK, "input": "and?"}, previous_response_id=first.id)
    expected = f"<user>hi\n<assistant>{first.output_text}\n<user>and?\n<assistant>"
    assert shared.engine.tokenizer.decode(shared.engine.seen[-1].prompt) == expected
    # and so does one whose client keeps the items itself
    items = [{"role": "user", "content": "hi"}, *[item.model_dump(exclude_none=True) for item in first.output]]
    shared.client.responses.create(**{**ASK, "input": [*items, {"role": "user", "content": "and?"}]})
    assert shared.engine.tokenizer.decode(shared.engine.seen[-1].prompt) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_thoughts_are_items(serve, stream: bool) -> None:
    engine = FakeEngine(answer=b"<think>hm</think>So." + HERMES_CALL, max_model_len=512)
    server = serve(engine, tool_form=TOOL_PARSERS["hermes"], reasoning_parser="qwen3")
    ask = {"model": "fake", "input": "hi", "tools": [TOOL]}
    if stream:
        with server.client.responses.stream(**ask) as events:
            kinds = [event.type for event in events]
            answer = events.get_final_response()
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
        assert "response.reasoning_text.delta" in kinds
        assert "response.function_call_arguments.done" in kinds
    else:
        answer = server.client.responses.create(**ask)
    thought, said, call = answer.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "hm")
    assert said.content[0].text == "So.Hm. "
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "time", {"zone": "CET"})
    assert answer.status == "completed"
    assert answer.usage.output_tokens_details.reasoning_tokens > 0
    given = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    server.client.responses.create(**{**ask, "input": [given]}, previous_response_id=answer.id)
    assert "<tool>noon" in server.engine.tokenizer.decode(server.engine.seen[-1].prompt)


def test_structured_text(shared: Server) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    shared.client.responses.create(**ASK, text={"format": form})
    assert shared.engine.seen[-1].params.structured_outputs.json == {"type": "object"}


def test_cancel_ends_what_runs_and_nothing_else(serve) -> None:
    server = serve(FakeEngine(token_seconds=0.02, answer=b"x" * 4000, max_model_len=4096))
    stream = server.client.responses.create(model="fake", input="hi", stream=True)
    created = next(iter(stream)).response
    assert server.client.responses.retrieve(created.id).status == "in_progress"
    assert server.client.responses.cancel(created.id).status == "cancelled"
    last = list(stream)[-1].response
    assert last.status == "cancelled"
    assert last.usage.output_tokens < 4000
    assert server.client.responses.retrieve(created.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="nothing to cancel"):
        server.client.responses.cancel(created.id)
    assert server.engine.aborted


def test_what_is_not_stored_is_not_found(shared: Server) -> None:
    answer = shared.client.responses.create(**ASK, store=False)
    for unknown in (answer.id, "resp_0"):
        with pytest.raises(openai.NotFoundError) as error:
            shared.client.responses.retrieve(unknown)
        assert error.value.code == "response_not_found"
        with pytest.raises(openai.NotFoundError):
            shared.client.responses.create(**ASK, previous_response_id=unknown)


def test_what_was_deleted_is_not_found(shared: Server) -> None:
    kept, gone = (shared.client.responses.create(**ASK) for _ in range(2))
    shared.client.responses.delete(gone.id)
    assert shared.client.responses.retrieve(kept.id).id == kept.id
    for again in (shared.client.responses.retrieve, shared.client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            again(gone.id)


def test_the_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_STORED", 3)
    ask = Inside()
    ids = [ask("POST", PATH, json=ASK).json()["id"] for _ in range(5)]
    assert [ask("GET", f"{PATH}/{one}").status_code for one in ids] == [404, 404, 200, 200, 200]
    monkeypatch.setattr(responses, "MAX_STORED_BYTES", 1500)
    ids = [ask("POST", PATH, json=ASK).json()["id"] for _ in range(2)]
    assert [ask("GET", f"{PATH}/{one}").status_code for one in ids] == [404, 200]


def test_tenants_do_not_see_each_other() -> None:
    one, other = "1" * 32, "2" * 32
    ask = Inside(keyring=Keyring([KeyEntry(one, "one"), KeyEntry(other, "other")]))
    mine, theirs = ({"x-api-key": key} for key in (one, other))
    created = ask("POST", PATH, json=ASK, headers=mine).json()["id"]
    assert ask("GET", f"{PATH}/{created}", headers=mine).status_code == 200
    assert ask("GET", f"{PATH}/{created}", headers=theirs).status_code == 404
    assert ask("POST", f"{PATH}/{created}/cancel", json={}, headers=theirs).status_code == 404
    again = {**ASK, "previous_response_id": created}
    assert ask("POST", PATH, json=again, headers=theirs).status_code == 404


def test_an_error_in_the_stream_is_an_event(serve) -> None:
    server = serve(FakeEngine(fail_after=2))
    last = list(server.client.responses.create(**ASK, stream=True))[-1]
    assert (last.type, last.code) == ("error", "engine_dead")
    assert "killed by a test" in last.message


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"include": ["x"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"request_id": "mine"}, "request_id"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"text": {"format": {"type": "json_object", "name": "x"}}}, "response_format.json_schema.schema"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_refusals_name_the_parameter(shared: Server, changes: dict, param: str) -> None:
    answer = shared.http.post(PATH, json={**ASK, **changes})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_parameters_of_a_retrieval_are_refused(shared: Server) -> None:
    answer = shared.http.get(f"{PATH}/resp_0?include=x")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "include"
