from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.bench.datasets import Dataset
from octavo.errors import ConfigError

VOCABULARY = 50


class Words:
    """A tokenizer of words; id 0 is special."""

    special_ids = frozenset({0})
    vocab_size = VOCABULARY

    def encode(self, text: str) -> list[int]:
        return [1 + len(word) % (VOCABULARY - 1) for word in text.split()]


def made(tokenizer: Any = None, **fields: Any) -> list[Any]:
    return Dataset(**fields).prompts(tokenizer or Words(), VOCABULARY)


def test_random_has_exact_lengths_and_no_special_ids() -> None:
    prompts = made(num_prompts=9, input_len=7, output_len=3, prefix_len=2)
    assert [(len(p.token_ids), p.output_len) for p in prompts] == [(9, 3)] * 9
    assert all(0 < i < VOCABULARY for p in prompts for i in p.token_ids)
    assert len({tuple(p.token_ids[:2]) for p in prompts}) == 1, "one prefix"
    assert len({tuple(p.token_ids[2:]) for p in prompts}) > 1


def test_random_range_ratio_spreads_lengths_both_ways() -> None:
    lengths = [len(p.token_ids) for p in made(num_prompts=200, input_len=100, range_ratio=0.2)]
    assert 80 <= min(lengths) < 90 < 110 < max(lengths) <= 120


def test_random_works_on_token_ids_alone() -> None:
    assert len(Dataset(num_prompts=2, input_len=4).prompts(None, VOCABULARY)) == 2


def test_seed_decides() -> None:
    assert made(seed=1) == made(seed=1)
    assert made(seed=1) != made(seed=2)


def test_prefix_repetition_shares_prefixes_evenly() -> None:
    prompts = made(name="prefix_repetition", num_prompts=12, num_prefixes=3, prefix_len=8, input_len=2)
    counts: dict[tuple[int, ...], int] = {}
    for p in prompts:
        counts[tuple(p.token_ids[:8])] = counts.get(tuple(p.token_ids[:8]), 0) + 1
    assert sorted(counts.values()) == [4, 4, 4]


def test_sharegpt_takes_first_turns_and_drops_the_unusable(tmp_path: Path) -> None:
    def talk(question: str, answer: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    rows = [
        talk("one two three four five", "a b c d e f"),
        talk("too short", "a b c d e f"),
        talk("one two three four five", "short"),
        talk("word " * 1100, "a b c d e f"),
        {"conversations": [{"value": "alone"}]},
        {"conversations": [{"from": "human"}, {"from": "gpt"}]},
        {"conversations": None},
        "no talk",
    ]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(rows))
    prompts = made(name="sharegpt", path=path, num_prompts=3)
    assert [(p.text, p.output_len) for p in prompts] == [("one two three four five", 6)] * 3, (
        "asked again to make three"
    )
    assert made(name="sharegpt", path=path, num_prompts=1, fixed_output_len=9)[0].output_len == 9


def test_custom_lines_may_say_how_many_tokens(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b", "output_tokens": 5}\n\n{"prompt": "c"}\n')
    assert [(p.text, p.output_len) for p in made(name="custom", path=path, num_prompts=2, output_len=7)] == [
        ("a b", 5),
        ("c", 7),
    ]


@pytest.mark.parametrize(
    ("fields", "content", "words"),
    [
        ({"name": "sonnet"}, None, "must be one of random, sharegpt"),
        ({"name": "sharegpt"}, None, "needs --dataset-path"),
        ({"name": "random", "path": "x"}, "{}", "random reads no --dataset-path"),
        ({"range_ratio": 1.0}, None, "below 1"),
        ({"name": "custom", "path": "x"}, "{", "line 1 is not JSON"),
        ({"name": "custom", "path": "x"}, '{"text": "a"}', 'the string "prompt"'),
        ({"name": "custom", "path": "x"}, '{"prompt": "a", "output_tokens": "9"}', "must be 1 or more"),
        ({"name": "sharegpt", "path": "x"}, "5", "a list of conversations"),
        ({"name": "sharegpt", "path": "x"}, "[]", "no usable prompt"),
        ({"name": "sharegpt", "path": "missing"}, None, "No such file"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path: Path, fields: dict[str, Any], content: str | None, words: str) -> None:
    if "path" in fields:
        fields = fields | {"path": tmp_path / fields["path"]}
    if content is not None:
        (tmp_path / "x").write_text(content)
    with pytest.raises(ConfigError, match=words):
        made(**fields)
