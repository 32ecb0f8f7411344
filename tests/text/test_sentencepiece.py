"""The "llama" tokenizer kind equals SentencePiece itself, which is given the same vocabulary."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Sequence

import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import cases, tokenizer_json, vocabulary
from vocabularies import sentencepiece as tiny
from vocabularies import sentencepiece_metadata

from octavo.models.gguf_file import GGUFFile
from octavo.text.gguf_tokenizer import SPACE, TokenType, build_gguf_tokenizer
from octavo.text.tokenizer import Tokenizer, load_tokenizer

TINY = tiny()


def real_sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece with this vocabulary: its ModelProto (sentencepiece_model.proto), written by hand."""
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    trainer = b"\x18\x02" + b"\x98\x02\x01"  # model_type = BPE, byte_fallback
    normalizer = _field(1, b"identity") + b"\x18\x01\x20\x00\x28\x01"  # dummy prefix, spaces kept and escaped
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(pieces + _field(2, trainer) + _field(3, normalizer))
    return processor


def _random_texts(count: int) -> list[str]:
    """The published texts, random runs of their words and random runs of their characters."""
    texts = [text for text, _ in cases("llama-spm")]
    words, characters = " ".join(texts).split(" "), sorted(set("".join(texts)))
    generator = random.Random(0)
    for _ in range(count // 2):
        texts.append(" ".join(generator.choices(words, k=generator.randrange(8))))
        texts.append("".join(generator.choices(characters, k=generator.randrange(40))))
    return texts + [" " * length + "x" for length in range(100)]


def _field(number: int, content: bytes) -> bytes:
    length, size = len(content), b""
    while length >= 0x80:
        size += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


def _real(metadata: dict[str, object]) -> sentencepiece.SentencePieceProcessor:
    tokens, scores, types = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    return real_sentencepiece(tokens, scores, types)  # type: ignore[arg-type]


REAL_TINY = _real(sentencepiece_metadata())


@given(text=st.text(alphabet="the aloxé 中🦙", max_size=30))
@settings(max_examples=500, deadline=None)
def test_tiny_vocabulary_equals_sentencepiece(text: str) -> None:
    assert TINY.encode(text, add_special_tokens=False) == REAL_TINY.encode(text)


def test_llama_vocabulary_equals_sentencepiece() -> None:
    path = vocabulary("llama-spm")
    ours, theirs = load_tokenizer(path), _real(GGUFFile.open(path).metadata)
    for text in _random_texts(1000):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.encode("x")[0] == ours.bos_token_id == 1


def test_mistral_equals_its_tokenizer_json() -> None:
    """3 special and 256 byte tokens, then pieces with falling scores; runs of spaces are worth less than all others."""
    path = tokenizer_json("mistral")
    theirs = tokenizers.Tokenizer.from_file(str(path))
    vocab = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.scores": [-float(i) if token.strip(SPACE) else -1e9 for i, token in enumerate(tokens)],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    }
    ours = build_gguf_tokenizer(metadata)
    for text in _random_texts(2000):
        assert ours.encode(text).ids == theirs.encode(text).ids, text


def test_bytes_that_are_no_text_harm_only_themselves() -> None:
    ids = [TINY.encode("é中", add_special_tokens=False)[-3], *TINY.encode("he", add_special_tokens=False)]
    assert TINY.decode(ids) == "\ufffd he"


def test_the_space_prefix_is_the_files_choice() -> None:
    metadata = sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = build_gguf_tokenizer(metadata)
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("he", add_special_tokens=False).ids] == ["he"]
    assert TINY.token_text(TINY.encode("he", add_special_tokens=False)[0]) == " he"
    assert TINY.decode(TINY.encode("he he")) == "he he"


def test_user_defined_tokens_are_cut_out_first() -> None:
    """Gemma's vocabulary has runs of line ends and spaces, stored as they are in text."""
    metadata = sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": False}
    for key, added in (("tokens", ["\n\n", "  "]), ("token_type", [4, 4]), ("scores", [-1000.0, -1000.0])):
        metadata[f"tokenizer.ggml.{key}"] = [*metadata[f"tokenizer.ggml.{key}"], *added]
    tokenizer = build_gguf_tokenizer(metadata)
    encoding = tokenizer.encode("he\n\nhe   he", add_special_tokens=False)
    assert encoding.tokens == ["he", "\n\n", "he", "  ", "▁he"]
    assert Tokenizer(tokenizer).decode(encoding.ids) == "he\n\nhe   he"


def test_a_vocabulary_of_gemmas_size_builds_in_seconds() -> None:
    generator = random.Random(0)
    syllables = ["".join(generator.choices("abcdefghijklmnop", k=2)) for _ in range(128)]
    words = dict.fromkeys("abcdefghijklmnop")
    words |= dict.fromkeys("".join(generator.choices(syllables, k=generator.randrange(2, 5))) for _ in range(400_000))
    tokens = ["<unk>", *words][:262_144]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(TokenType.UNKNOWN)] + [int(TokenType.NORMAL)] * (len(tokens) - 1),
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    start = time.process_time()
    tokenizer = build_gguf_tokenizer(metadata)
    assert time.process_time() - start < 30.0  # 2 s when written; minutes where it is quadratic
    assert tokenizer.get_vocab_size() == len(tokens) > 200_000
