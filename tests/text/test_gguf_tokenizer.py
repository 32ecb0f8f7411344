"""Tokenizers from GGUF metadata: ids of real vocabularies, and files that lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from vectors import BYTE_LEVEL, SENTENCEPIECE, cases, tokenizer_json, vocabulary
from vocabularies import byte_level, byte_level_metadata, sentencepiece_metadata

from octavo.errors import InvalidValueError, ModelFileError, UnsupportedModelError
from octavo.models.gguf_file import GGUFFile
from octavo.text.gguf_tokenizer import build_gguf_tokenizer
from octavo.text.tokenizer import Tokenizer, load_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "\n\n\t \r\n",
    "Hello, world! It's 2024-01-31 and they'LL pay $1,234.50.",
    "    def f(x):\n\treturn x**2  # ½ of ² is ٣ or 五\n",
    "naïve café, e\u0301 and \u00e9, \u00a0\u3000\u200b wide",
    "한국어 日本語 中文字 кириллица ελληνικά עברית العربية",
    "🦙👩‍👧‍👦🏳️‍🌈 \x00\x7f\ufffd\U0010ffff",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|not a token|>",
]


@pytest.mark.parametrize("name", BYTE_LEVEL + SENTENCEPIECE)
def test_ids_equal_the_published_vectors(name: str) -> None:
    tokenizer = load_tokenizer(vocabulary(name))
    tests = cases(name)
    assert len(tests) >= 40
    for text, expected in tests:
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
    batch = tokenizer.encode_batch([text for text, _ in tests], add_special_tokens=False)
    assert batch == [expected for _, expected in tests]


@pytest.mark.parametrize("name", ["llama-bpe", "deepseek-coder", "llama-spm"])
def test_text_survives_the_round_trip(name: str) -> None:
    tokenizer = load_tokenizer(vocabulary(name))
    for text, _ in cases(name):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_gpt2_equals_its_tokenizer_json() -> None:
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_json("gpt2")))
    ours = load_tokenizer(vocabulary("gpt-2"))
    assert ours.vocab_size == theirs.get_vocab_size() == 50257
    for text in HARD_TEXTS + [text for text, _ in cases("gpt-2")]:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Tokenizer, Path]:
    from octavo.models.hub import resolve_model

    path = resolve_model("smollm2").path
    return load_tokenizer(path), path


@pytest.mark.model
def test_smollm2_equals_a_hand_built_oracle(smollm2: tuple[Tokenizer, Path]) -> None:
    """The tokenizer.json of this family: individual digits, then GPT-2's pattern, byte level."""
    ours, path = smollm2
    metadata = GGUFFile.open(path).metadata
    tokens: Any = metadata["tokenizer.ggml.tokens"]
    merges: Any = metadata["tokenizer.ggml.merges"]
    theirs = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges])
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(tokens[:17])
    for text in HARD_TEXTS:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_id) == (49152, 1, 2)
    assert ours.special_ids == frozenset(range(17))


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_token_bytes_add_up_to_the_text(text: str) -> None:
    tokenizer = TINY
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


TINY = byte_level()


def test_special_tokens_in_text_are_special() -> None:
    assert TINY.encode("hello</s>") == [*TINY.encode("hello"), 1]
    assert TINY.encode("«tool»") == [2]
    assert TINY.special_ids == {0, 1}
    assert TINY.decode([0, 2, 1]) == "«tool»"


def test_ids_without_a_token_have_no_text() -> None:
    assert TINY.token_bytes(-1) == TINY.token_bytes(10_000) == b""
    assert TINY.token_text(3 + 255) == "\ufffd"


def test_lone_surrogates_are_refused() -> None:
    for encode in (TINY.encode, lambda text: TINY.encode_batch(["fine", text])):
        with pytest.raises(InvalidValueError, match="surrogate at character 2"):
            encode("ab\ud800")


def test_bos_and_eos_are_added_as_the_file_says() -> None:
    metadata = byte_level_metadata()
    assert build_gguf_tokenizer(metadata).encode("a").ids == [TINY.encode("a")[0]]
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = build_gguf_tokenizer(metadata)
    assert tokenizer.encode("a").ids == [0, TINY.encode("a")[0], 1]
    assert tokenizer.encode("a", add_special_tokens=False).ids == [TINY.encode("a")[0]]
    metadata = byte_level_metadata() | {"tokenizer.ggml.pre": "llama-bpe"}
    assert build_gguf_tokenizer(metadata).encode("a").ids[0] == 0  # Llama 3 adds it by default
    assert build_gguf_tokenizer(sentencepiece_metadata()).encode("a").ids[0] == 1


def test_tekken_cuts_where_words_turn_to_upper_case() -> None:
    """As the tokenizer.json of Mistral Nemo does."""
    tokenizer = build_gguf_tokenizer(byte_level_metadata() | {"tokenizer.ggml.pre": "tekken"})
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("HelloWorld it's  42\n")]
    assert pieces == ["Hello", "World", "Ġit", "'s", "Ġ", "Ġ", "4", "2", "Ċ"]


def test_fill_names_are_not_added_tokens() -> None:
    metadata = byte_level_metadata()
    name = f"[PAD{len(metadata['tokenizer.ggml.tokens'])}]"
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], name]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    assert len(build_gguf_tokenizer(metadata).encode(name).ids) == len(name)


Change = Callable[[dict[str, Any]], object]
BROKEN: dict[str, Change] = {
    "tokens missing": lambda m: m.pop("tokenizer.ggml.tokens"),
    "tokens empty": lambda m: m.update({"tokenizer.ggml.tokens": []}),
    "tokens of numbers": lambda m: m.update({"tokenizer.ggml.tokens": [1, 2]}),
    "types too short": lambda m: m["tokenizer.ggml.token_type"].pop(),
    "unknown type": lambda m: m["tokenizer.ggml.token_type"].__setitem__(5, 9),
    "a list for a type": lambda m: m["tokenizer.ggml.token_type"].__setitem__(5, [1]),
    "bos out of range": lambda m: m.update(
        {"tokenizer.ggml.bos_token_id": 1 << 20, "tokenizer.ggml.add_bos_token": True}
    ),
    "bos missing": lambda m: (m.pop("tokenizer.ggml.bos_token_id"), m.update({"tokenizer.ggml.add_bos_token": True})),
    "flag of the wrong type": lambda m: m.update({"tokenizer.ggml.add_bos_token": "yes"}),
    "model of the wrong type": lambda m: m.update({"tokenizer.ggml.model": 7}),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("make", [byte_level_metadata, sentencepiece_metadata], ids=["gpt2", "llama"])
def test_inconsistent_metadata_is_refused(make: Callable[[], dict[str, Any]], change: Change) -> None:
    metadata = make()
    change(metadata)
    with pytest.raises(ModelFileError, match=r"GGUF: .*tokenizer\.ggml\."):
        build_gguf_tokenizer(metadata)


@pytest.mark.parametrize("merge", ["ab", "a ", "zz yy"])
def test_merges_that_do_not_fit_are_refused(merge: str) -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.merges"] = [merge]
    with pytest.raises(ModelFileError, match="merges"):
        build_gguf_tokenizer(metadata)


@pytest.mark.parametrize("scores", [[1.0], None, "x"])
def test_scores_that_do_not_fit_are_refused(scores: object) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.scores"):
        build_gguf_tokenizer(sentencepiece_metadata() | {"tokenizer.ggml.scores": scores})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer.ggml.pre": "made-up"}, "'made-up'"),
        ({"tokenizer.ggml.model": "t5"}, "'t5'"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.precompiled_charsmap": [1]}, "precompiled_charsmap"),
    ],
)
def test_what_is_not_built_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        build_gguf_tokenizer(byte_level_metadata() | change)


def test_a_missing_pre_tokenizer_is_never_guessed() -> None:
    metadata = byte_level_metadata()
    del metadata["tokenizer.ggml.pre"]
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.pre"):
        build_gguf_tokenizer(metadata)
