"""Tiny vocabularies, written as the metadata of a GGUF file."""

from __future__ import annotations

from typing import Any

from octavo.text.gguf_tokenizer import build_gguf_tokenizer
from octavo.text.tokenizer import _BYTE_OF_CHARACTER, Tokenizer

SPECIAL = ["<s>", "</s>"]


def byte_level_metadata() -> dict[str, Any]:
    """Ids 0-1 special, 2 user-defined, then the 256 bytes, then a few merged tokens."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ã ©", "ð Ł", "ðŁ ¦", "ðŁ¦ Ļ"]
    tokens = [*SPECIAL, "«tool»", *_BYTE_OF_CHARACTER, *(m.replace(" ", "") for m in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def sentencepiece_metadata() -> dict[str, Any]:
    """Ids 0 unknown, 1-2 special, then the 256 bytes, then pieces with falling scores."""
    pieces = ["▁t", "he", "▁the", "ll", "▁he", "▁hell", "▁hello", "aa", "aaaa", *"▁abcdefghijklmnopqrstuvwxyzé.,"]
    tokens = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def byte_level() -> Tokenizer:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(build_gguf_tokenizer(byte_level_metadata()), special_tokens=names)


def sentencepiece() -> Tokenizer:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(build_gguf_tokenizer(sentencepiece_metadata()), special_tokens=names)
