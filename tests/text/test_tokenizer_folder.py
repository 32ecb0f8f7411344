"""Tokenizers from a Hugging Face folder."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models
from vocabularies import byte_level_metadata, sentencepiece_metadata

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.spec import ModelFiles
from octavo.text.gguf_tokenizer import build_gguf_tokenizer
from octavo.text.tokenizer import LONG_TEXT, has_tokenizer, load_tokenizer


def write(folder: Path, config: dict[str, Any] | None = None, *, sentencepiece: bool = False) -> Path:
    metadata = sentencepiece_metadata() if sentencepiece else byte_level_metadata()
    build_gguf_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_a_folder_equals_the_gguf_it_was_made_from(tmp_path: Path, sentencepiece: bool) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "chat_template": "hi"}
    tokenizer = load_tokenizer(ModelFiles("m", "hf", write(tmp_path, config, sentencepiece=sentencepiece)))
    metadata = sentencepiece_metadata() if sentencepiece else byte_level_metadata()
    assert tokenizer.encode("hello the é") == build_gguf_tokenizer(metadata).encode("hello the é").ids
    assert tokenizer.decode(tokenizer.encode("hello the é")) == "hello the é"
    assert tokenizer.vocab_size == len(metadata["tokenizer.ggml.tokens"])
    assert tokenizer.bos_token_id == metadata["tokenizer.ggml.bos_token_id"]
    assert tokenizer.eos_token_id == metadata["tokenizer.ggml.eos_token_id"]
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.chat_template == "hi"


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    core = build_gguf_tokenizer(byte_level_metadata())
    core.enable_truncation(2)
    core.enable_padding(length=9)
    core.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("abcde")) == 5


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"add_bos_token": True}, [0, "a"]),
        ({"add_bos_token": True, "add_eos_token": True}, [0, "a", 1]),
        ({"add_bos_token": False}, ["a"]),
        ({}, ["a"]),
    ],
)
def test_the_config_says_what_is_added(tmp_path: Path, config: dict[str, Any], expected: list[int | str]) -> None:
    tokenizer = load_tokenizer(write(tmp_path, {"bos_token": "<s>", "eos_token": "</s>", **config}))
    letter = tokenizer.encode("a", add_special_tokens=False)[0]
    assert tokenizer.encode("a") == [letter if x == "a" else x for x in expected]


def test_chat_template_sources_in_order(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write(tmp_path, {"chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_tokenizer(tmp_path).chat_template == "J"


def test_special_tokens_map_fills_gaps(tmp_path: Path) -> None:
    write(tmp_path, {"bos_token": "<s>"})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": "</s>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_a_folder_without_a_fast_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(ModelFileError, match="no tokenizer files"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert has_tokenizer(tmp_path)
    with pytest.raises(ModelFileError, match=r"only tokenizer\.model.*save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"model": {}}'),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"bos_token": "<none>", "add_bos_token": true}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=r"token|template"):
        load_tokenizer(tmp_path)


def test_a_decoder_that_is_not_built_is_named(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModelError, match="decoder none"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_a_long_text_has_the_ids_of_its_parts_and_at_least_the_fewest(tmp_path: Path, sentencepiece: bool) -> None:
    tokenizer = load_tokenizer(write(tmp_path, sentencepiece=sentencepiece))
    text = "hello the é " * (LONG_TEXT // 8)
    ids = tokenizer.encode(text)
    assert len(text) > LONG_TEXT
    assert ids == tokenizer._core.encode(text).ids
    assert 1 < tokenizer.fewest_tokens(text) <= len(ids)


def test_other_threads_run_while_a_long_text_is_tokenised(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path))
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(len(tokenizer.encode("hello the é " * 100_000))))
    turns = 0
    thread.start()
    while thread.is_alive():
        turns += 1
    assert done[0] > 100_000
    assert turns > 1000  # with the GIL held there would be none but a few at either end
