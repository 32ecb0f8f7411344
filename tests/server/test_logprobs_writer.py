"""Text offsets of the completions shape follow the text that is really shown."""

import pytest
from fake_engine import BOS, FakeTokenizer

from octavo.outputs import CompletionOutput, Logprob
from octavo.server.logprobs import LogprobsWriter

TOKENS = [ord("a"), BOS, *"é".encode(), ord("b")]
OUTPUT = CompletionOutput(0, "aéb", TOKENS, logprobs=[{token: Logprob(-1.0)} for token in TOKENS])


@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_count_shown_characters_whatever_the_labels(as_ids):
    writer = LogprobsWriter(FakeTokenizer(), 0, as_ids=as_ids, unseen=FakeTokenizer.special_ids)
    assert writer.lists(OUTPUT.token_ids, OUTPUT.logprobs)["text_offset"] == [0, 1, 1, 1, 2]


def test_special_tokens_that_are_shown_count():
    shape = LogprobsWriter(FakeTokenizer(), 0).lists(OUTPUT.token_ids, OUTPUT.logprobs)
    assert shape["text_offset"] == [0, 1, 6, 6, 7]
    assert shape["tokens"] == ["a", "<bos>", "bytes:\\xc3", "bytes:\\xa9", "b"]


def test_ids_stand_for_tokens_without_a_tokenizer_or_when_asked():
    for writer in (LogprobsWriter(None, 0), LogprobsWriter(FakeTokenizer(), 0, as_ids=True)):
        entry = writer.chat(OUTPUT)["content"][0]
        assert (entry["token"], entry["bytes"]) == ("token_id:97", None)
