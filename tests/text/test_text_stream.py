"""A stream of text equals the text decoded at once, and stops where a naive search says."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import byte_level, sentencepiece

from octavo.sampling_params import SamplingParams
from octavo.text.stream import TextStream
from octavo.text.tokenizer import Tokenizer

BYTE_LEVEL = byte_level()
SENTENCEPIECE = sentencepiece()
NUM_IDS = 300  # a little above both vocabularies: ids without a token occur

id_lists = st.lists(st.lists(st.integers(0, NUM_IDS), max_size=4), max_size=12)
texts = st.text(alphabet="abc é🦙\n", max_size=40)
stop_lists = st.lists(st.text(alphabet="abc é🦙", min_size=1, max_size=4), min_size=1, max_size=4)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@given(chunks=id_lists, skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_stream_equals_decode(tokenizer: Tokenizer, chunks: list[list[int]], skip: bool) -> None:
    stream = TextStream(tokenizer, SamplingParams(skip_special_tokens=skip))
    streamed = "".join(stream.add(chunk).text for chunk in chunks) + stream.finish()
    prompt = tokenizer.encode("the", add_special_tokens=False)
    ids = [token for chunk in chunks for token in chunk]
    prompt_text = tokenizer.decode(prompt)
    assert prompt_text + streamed == tokenizer.decode(prompt + ids, skip_special_tokens=skip)


@given(text=st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_half_characters(text: str) -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams())
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    seen = ""
    for token in ids:
        seen += stream.add([token]).text
        assert text.startswith(seen)
    assert seen + stream.finish() == BYTE_LEVEL.decode(ids) == text


def test_a_character_comes_whole_and_a_broken_one_at_the_end() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams())
    ids = [3 + byte_index for byte_index in _byte_indices("é🦙".encode())]
    assert [stream.add([token]).text for token in ids[:-1]] == ["", "é", "", "", ""]
    assert stream.finish() == "\ufffd"


def test_special_tokens_are_left_out_or_shown() -> None:
    ids = [1, *BYTE_LEVEL.encode("hello"), 0, 2]
    assert TextStream(BYTE_LEVEL, SamplingParams()).add(ids).text == "hello«tool»"
    shown = TextStream(BYTE_LEVEL, SamplingParams(skip_special_tokens=False))
    assert shown.add(ids).text == "</s>hello<s>«tool»"


def naive_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(end, stop) of the stop string that is completed first; of several with one end, the longest."""
    found = [(m.start() + len(s), -len(s), s) for s in stops for m in re.finditer(f"(?={re.escape(s)})", text)]
    return (min(found)[0], min(found)[2]) if found else None


@given(text=texts, stops=stop_lists, include=st.booleans(), size=st.integers(1, 5))
@settings(max_examples=500, deadline=None)
def test_stop_strings_equal_a_naive_search(text: str, stops: list[str], include: bool, size: int) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=stops, include_stop_str_in_output=include))
    streamed, stop, num_kept = "", None, None
    for start in range(0, len(ids), size):
        delta = stream.add(ids[start : start + size])
        streamed += delta.text
        if delta.stop is not None:
            stop, num_kept = delta.stop, delta.num_kept
            break
    streamed += stream.finish()
    expected = naive_stop(text, stops)
    if expected is None:
        assert (streamed, stop, num_kept) == (text, None, None)
        return
    end, expected_stop = expected
    assert stop == expected_stop
    assert streamed == text[: end if include else end - len(stop)]
    assert num_kept is not None
    kept_text = BYTE_LEVEL.decode(ids[:num_kept])
    assert len(kept_text.rstrip("\ufffd")) >= end > len(BYTE_LEVEL.decode(ids[: num_kept - 1]).rstrip("\ufffd"))


def test_text_that_may_begin_a_stop_string_is_held_back_and_released() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=["END", "E."]))
    assert [stream.add(_ids(part)).text for part in ("xE", "N", "x", "E")] == ["x", "", "ENx", ""]
    assert stream.finish() == "E"


def test_what_follows_a_stop_string_is_ignored() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop="b"))
    first = stream.add(_ids("abc"))
    assert (first.text, first.stop, first.num_kept) == ("a", "b", 2)
    again = stream.add(_ids("def"))
    assert (again.text, again.stop, again.num_kept) == ("", "b", 2)
    assert stream.finish() == ""


def test_stop_strings_within_min_tokens_do_not_count() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop="b", min_tokens=3, max_tokens=9))
    delta = stream.add(_ids("bbcab"))
    assert (delta.text, delta.stop, delta.num_kept) == ("bbca", "b", 5)


def test_the_stop_token_is_silent_unless_asked_for() -> None:
    ids = _ids("ab")
    params = SamplingParams(stop="x", skip_special_tokens=False)
    assert TextStream(BYTE_LEVEL, params).add(ids, ends_with_stop_token=True).text == "a"
    params = SamplingParams(include_stop_str_in_output=True)
    assert TextStream(BYTE_LEVEL, params).add(ids, ends_with_stop_token=True).text == "ab"


def test_detokenize_false_gives_no_text() -> None:
    stream = TextStream(BYTE_LEVEL, SamplingParams(detokenize=False))
    delta = stream.add(_ids("abc"))
    assert (delta.text, delta.stop, stream.finish()) == ("", None, "")


def test_work_does_not_grow_with_what_was_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = BYTE_LEVEL.token_bytes
    monkeypatch.setattr(BYTE_LEVEL, "token_bytes", lambda token: calls.append(token) or plain(token))
    stream = TextStream(BYTE_LEVEL, SamplingParams(stop=["hello hello"]))
    for token in _ids("hello ") * 50:
        stream.add([token])
    assert len(calls) <= 100


def _ids(text: str) -> list[int]:
    return BYTE_LEVEL.encode(text, add_special_tokens=False)


def _byte_indices(data: bytes) -> list[int]:
    order = [BYTE_LEVEL.token_bytes(3 + i)[0] for i in range(256)]
    return [order.index(byte) for byte in data]
