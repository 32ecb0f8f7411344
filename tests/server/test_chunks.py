"""The prepared path of a stream writes what the general one writes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.server.chunks import ChunkWriter, Timing, Usage

HEAD = {"id": 'a"b', "created": 1, "model": 'm\\%d"{}', "object": "x"}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def event(chunk: bytes) -> dict:
    assert chunk.startswith(b"data: ")
    assert chunk.endswith(b"\n\n")
    assert chunk.count(b"\n") == 2  # a newline in the text would end the event early
    return json.loads(chunk[6:])


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("usage", [None, Usage()])
@given(text=TEXTS)
def test_both_paths_agree(chat: bool, usage: Usage | None, text: str) -> None:
    writer = ChunkWriter(HEAD, 12, chat=chat, usage=usage)
    fast, slow = event(writer.text(11, text)), event(writer.choice(11, text))
    assert fast == slow
    choice = fast["choices"][0]
    assert (choice["delta"]["content"] if chat else choice["text"]) == text
    assert choice["index"] == 11
    assert ("usage" in fast) == (usage is not None)
    assert fast["model"] == HEAD["model"]


def test_the_end_of_a_chat_choice_has_an_empty_delta() -> None:
    chunk = event(ChunkWriter(HEAD, 1, chat=True, usage=None).choice(0, "", finish_reason="stop"))
    assert chunk["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]


def test_the_last_chunk() -> None:
    assert ChunkWriter(HEAD, 1, chat=True, usage=None).last(Timing()) == b"data: [DONE]\n\n"
    usage, done, _ = ChunkWriter(HEAD, 1, chat=True, usage=Usage(3, 4, 2)).last(Timing()).split(b"\n\n")
    assert json.loads(usage[6:])["choices"] == []
    assert json.loads(usage[6:])["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert done == b"data: [DONE]"
