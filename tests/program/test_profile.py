"""The profile sums layers and steps, keeps decode apart, and measures nodes against the roofline."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from octavo.models.decoder import record
from octavo.models.reader import read_spec
from octavo.program.ops import Attention, Buffer, Rows, Sizes
from octavo.program.printer import Cost
from octavo.program.profile import Limits, Profile
from tests.model.tiny import make_tiny


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    program = record(read_spec(make_tiny("gemma3", tmp_path)))
    return Profile(
        program, Limits(1e9, {"float32": 1e10}), lambda w: 4 * math.prod(w.shape), 4, ["float32"] * len(program.nodes)
    )


def test_layers_and_steps_are_summed_and_kinds_kept_apart(profile: Profile) -> None:
    num_nodes = len(profile._nodes)
    for _ in range(2):
        profile.add(Sizes(3, 3, 10, num_requests=3), [(1000, 1)] * (num_nodes + 1))
    profile.add(Sizes(9, 1, 5, num_requests=1), [(5000, 1)] * (num_nodes + 1))
    assert (profile.decode.count, profile.other.count) == (2, 1)
    windowed = profile.decode.lines["attention", "Attention window 5"]
    assert (windowed.num_nodes, windowed.barriers) == (2, 4)
    assert windowed.seconds == pytest.approx(4e-6)
    assert sum(line.num_nodes for line in profile.decode.lines.values()) == num_nodes + 1
    text = profile.describe()
    assert "decode steps: 2, of 3.0 tokens" in text
    assert "prompt steps: 1, of 9.0 tokens" in text


def test_the_limit_is_the_roofline() -> None:
    limits = Limits(bytes_per_second=100.0, operations_per_second={"float32": 1000.0, "int8": 4000.0})
    assert limits.seconds(Cost(moved=200, operations=10), "float32") == 2.0
    assert limits.seconds(Cost(moved=200, operations=5000), "float32") == 5.0
    assert limits.seconds(Cost(moved=200, operations=16000), "int8") == 4.0


@pytest.mark.parametrize(("window", "read"), [(0, 20), (4, 13), (100, 20)])
def test_kv_is_read_once_for_all_tokens_of_a_request(window: int, read: int) -> None:
    q, out = Buffer("q", Rows.TOKENS, 8), Buffer("out", Rows.TOKENS, 8)
    node = Attention("a", q, out, 0, num_heads=2, num_kv_heads=1, head_dim=4, scale=1.0, window=window)
    sizes = Sizes(num_tokens=20, num_logits=2, context_len=15.5, num_requests=2)  # positions 11 to 20
    assert node.bytes_moved(sizes, lambda _: 0, 2) == 2 * (2 * read * 4 * 2) + 20 * 16 * 4
