"""The official client against the application: what it parses is what OpenAI would have sent."""

from __future__ import annotations

import asyncio

import openai
import pytest
from fake_engine import FakeEngine
from live_server import Server

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
PROMPT_LENGTH = len("<user>hi\n<assistant>")  # one token per byte; chat adds no <bos>
TEXT = "".join(chr((PROMPT_LENGTH + i) % 26 + 97) for i in range(4))


def test_chat(shared: Server) -> None:
    answer = shared.client.chat.completions.create(**CHAT)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "fake"
    assert [c.index for c in answer.choices] == [0]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.usage.prompt_tokens == PROMPT_LENGTH
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == PROMPT_LENGTH + 4
    assert answer.usage.prompt_tokens_details.cached_tokens == 16


def test_chat_without_max_tokens_uses_the_rest_of_the_context(serve) -> None:
    server = serve(FakeEngine(answer=b"x" * 200))
    answer = server.client.chat.completions.create(model="fake", messages=CHAT["messages"])
    assert answer.usage.completion_tokens == 128 - PROMPT_LENGTH


def test_completion_defaults_to_16_tokens(shared: Server) -> None:
    answer = shared.client.completions.create(model="alias", prompt="ab")
    assert answer.object == "text_completion"
    assert answer.model == "alias"
    assert answer.choices[0].text == "defghijklmnopqrs"  # three prompt tokens: the fourth letter on
    assert answer.usage.completion_tokens == 16


def test_chat_stream(shared: Server) -> None:
    chunks = list(shared.client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.content for c in chunks[1:5]] == list(TEXT)
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 5 + ["length"]
    assert [c.usage for c in chunks[:-1]] == [None] * 6
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert chunks[-1].usage.prompt_tokens == PROMPT_LENGTH


def test_stream_without_usage_has_no_usage_chunk(shared: Server) -> None:
    chunks = list(shared.client.chat.completions.create(**CHAT, stream=True))
    assert all(len(c.choices) == 1 for c in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_continuous_usage_counts_up(shared: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(shared.client.chat.completions.create(**CHAT, stream=True, stream_options=options))
    assert [c.usage.completion_tokens for c in chunks[1:5]] == [1, 2, 3, 4]


def test_completion_stream(shared: Server) -> None:
    chunks = list(shared.client.completions.create(model="fake", prompt="ab", max_tokens=3, stream=True))
    assert [c.choices[0].text for c in chunks] == ["d", "e", "f", ""]
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_n_in_order(shared: Server, stream: bool) -> None:
    answer = shared.client.completions.create(model="fake", prompt=["a", "bb"], n=2, max_tokens=3, stream=stream)
    if stream:
        texts = ["", "", "", ""]
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        assert [c.index for c in answer.choices] == [0, 1, 2, 3]
        texts = [c.text for c in answer.choices]
        assert answer.usage.prompt_tokens == 2 + 3  # each prompt counts once
        assert answer.usage.completion_tokens == 4 * 3
    assert texts == ["cde", "def", "def", "efg"]


def test_chat_stream_of_several_choices_gives_each_its_role(shared: Server) -> None:
    chunks = list(shared.client.chat.completions.create(**CHAT, n=2, stream=True))
    roles = [c.choices[0].index for c in chunks if c.choices[0].delta.role]
    assert roles == [0, 1]
    ended = [c.choices[0].index for c in chunks if c.choices[0].finish_reason]
    assert sorted(ended) == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(shared: Server, stream: bool) -> None:
    answer = shared.client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        entries = [e for c in answer if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    else:
        entries = answer.choices[0].logprobs.content
    assert [e.token for e in entries] == list(TEXT)
    assert entries[0].bytes == [ord(TEXT[0])]
    assert entries[0].logprob == -1.0
    assert [(t.token, t.logprob) for t in entries[0].top_logprobs] == [(TEXT[0], -1.0), (TEXT[1], -1.5)]


def test_completion_logprobs(shared: Server) -> None:
    answer = shared.client.completions.create(model="fake", prompt="ab", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["d", "e", "f"]
    assert logprobs.token_logprobs == [-1.0] * 3
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs == [{"d": -1.0, "e": -1.5}, {"e": -1.0, "f": -1.5}, {"f": -1.0, "g": -1.5}]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_tells_the_prompt_too(shared: Server, stream: bool) -> None:
    answer = shared.client.completions.create(
        model="fake", prompt="ab", max_tokens=2, logprobs=2, echo=True, n=2, stream=stream
    )
    texts, told = ["", ""], [[], []]
    for choice in [c.choices[0] for c in answer] if stream else answer.choices:
        texts[choice.index] += choice.text
        told[choice.index].append(choice.logprobs)
    assert texts == ["abde", "abef"]
    for parts, text in zip(told, texts, strict=True):
        parts = [part for part in parts if part]
        assert [t for part in parts for t in part.tokens] == ["<bos>", *text]
        assert [p for part in parts for p in part.token_logprobs] == [None, -1.0, -1.0, -1.0, -1.0]
        assert [o for part in parts for o in part.text_offset] == [0, 0, 1, 2, 3]
        tops = [t for part in parts for t in part.top_logprobs]
        assert tops[:2] == [None, {"a": -1.0, "b": -1.5}]
        assert len(tops) == 5


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_alone_scores_the_prompt(shared: Server, stream: bool) -> None:
    answer = shared.client.completions.create(
        model="fake", prompt="ab", max_tokens=0, logprobs=1, echo=True, n=2, stream=stream,
        extra_body={"return_token_ids": True}, **({"stream_options": {"include_usage": True}} if stream else {}),
    )  # fmt: skip
    chunks = list(answer) if stream else [answer]
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 0)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    for index in range(2):
        own = [choice for choice in choices if choice.index == index]
        assert "".join(choice.text for choice in own) == "ab"
        assert [token for choice in own for token in getattr(choice, "token_ids", [])] == []
        assert own[-1].finish_reason == "length"
        told = [choice.logprobs for choice in own if choice.logprobs and choice.logprobs.tokens]
        assert [t.tokens for t in told] == [["<bos>", "a", "b"]]
        assert told[0].token_logprobs == [None, -1.0, -1.0]


def test_prompt_logprobs_as_vllm_shows_them(shared: Server) -> None:
    first = {"97": {"logprob": -1.0, "rank": 1, "decoded_token": "a"}}
    second = {"98": {"logprob": -1.0, "rank": 1, "decoded_token": "b"}}
    body = {"model": "fake", "prompt": ["ab", "a"], "prompt_logprobs": 0, "max_tokens": 1}
    answer = shared.http.post("/v1/completions", json=body).json()
    assert [c["prompt_logprobs"] for c in answer["choices"]] == [[None, first, second], [None, first]]
    assert answer["choices"][0]["logprobs"] is None
    answer = shared.http.post("/v1/chat/completions", json={**CHAT, "prompt_logprobs": 1}).json()
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == PROMPT_LENGTH
    assert "prompt_logprobs" not in shared.http.post("/v1/chat/completions", json=CHAT).json()


@pytest.mark.parametrize("stream", [False, True])
def test_characters_of_several_tokens_arrive_whole(serve, stream: bool) -> None:
    server = serve(FakeEngine(answer="né€".encode()))
    answer = server.client.completions.create(model="fake", prompt="a", stream=stream, logprobs=0)
    if stream:
        chunks = list(answer)
        assert [c.choices[0].text for c in chunks] == ["n", "", "é", "", "", "€", "", ""]
        offsets = [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset]
    else:
        assert answer.choices[0].text == "né€"
        offsets = answer.choices[0].logprobs.text_offset
        assert answer.choices[0].logprobs.tokens[1:3] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert offsets == [0, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(("stop", "expected"), [("g", "def"), (["zz", "fg"], "de")])
def test_stop(shared: Server, stop: str | list[str], expected: str) -> None:
    answer = shared.client.completions.create(model="fake", prompt="ab", stop=stop)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == (stop if isinstance(stop, str) else "fg")


def test_async_client_runs_many_at_once(serve) -> None:
    server = serve(FakeEngine(token_seconds=0.01))

    async def one(client: openai.AsyncOpenAI, length: int) -> str:
        stream = await client.completions.create(model="fake", prompt="x" * length, max_tokens=4, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, length) for length in range(20)))

    for length, text in enumerate(asyncio.run(main())):
        assert text == "".join(chr((length + 1 + i) % 26 + 97) for i in range(4))


def test_models(shared: Server) -> None:
    assert [m.id for m in shared.client.models.list()] == ["fake", "alias"]
    assert shared.client.models.retrieve("alias").max_model_len == 128
    with pytest.raises(openai.NotFoundError, match="not served"):
        shared.client.models.retrieve("gpt-9")


def test_errors_have_the_client_s_classes(shared: Server) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        shared.client.completions.create(model="gpt-9", prompt="a")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        shared.client.completions.create(model="fake", prompt="a" * 200)
    assert long.value.code == "context_length_exceeded"
    assert "201 tokens" in long.value.message


def test_assistant_message_can_be_sent_back_as_it_came(shared: Server) -> None:
    first = shared.client.chat.completions.create(**CHAT).choices[0].message
    messages = [*CHAT["messages"], first.model_dump(), {"role": "user", "content": "go on"}]
    answer = shared.client.chat.completions.create(model="fake", messages=messages, max_tokens=1)
    assert answer.usage.prompt_tokens == len(f"<user>hi\n<assistant>{TEXT}\n<user>go on\n<assistant>")
