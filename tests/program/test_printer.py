"""Costs add up, and the table says what the program says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from octavo.models.decoder import record
from octavo.models.reader import read_spec
from octavo.program.ops import Experts, Sizes, Weight
from octavo.program.printer import cost_of, describe
from octavo.program.program import Program
from tests.model.tiny import make_tiny

SIZES = Sizes(num_tokens=7, num_logits=2, context_len=50)


def float_bytes(weight: Weight) -> int:
    return 4 * math.prod(weight.shape)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return record(read_spec(make_tiny("gemma3", tmp_path)))


def test_operations_of_a_decoder_by_hand(program: Program) -> None:
    hidden, inner, q_width, kv_width, vocab = 48, 72, 4 * 24, 2 * 24, 101
    qkv, rest = hidden * (q_width + 2 * kv_width), q_width * hidden + 3 * hidden * inner
    windows = (5, 50, 5, 50)  # positions attended in each layer
    products = 7 * 4 * qkv + (7 * 3 + 2) * rest + 2 * hidden * vocab  # behind the last attention only 2 rows are left
    expected = 2 * products + sum(4 * 7 * q_width * seen for seen in windows)
    small = sum(n.operations(SIZES) for n in program.nodes if type(n).__name__ not in ("Linear", "Attention"))
    assert cost_of(program.nodes, SIZES, float_bytes).operations == expected + small
    assert small < 0.05 * expected


def test_experts_count_what_is_chosen(tmp_path: Path) -> None:
    program = record(read_spec(make_tiny("qwen2moe", tmp_path)))
    node = next(n for n in program.nodes if isinstance(n, Experts))
    held = sum(float_bytes(w) for w in node.weights)
    assert (held, node.operations(Sizes(5, 5, 50))) == (4 * 7 * 3 * 48 * 28, 2 * 5 * 3 * 3 * 48 * 28)
    width = sum(buffer.width for buffer in node.inputs + node.outputs)
    moved = [node.bytes_moved(Sizes(n, n, 50), float_bytes, 4) - 4 * n * width for n in (0, 1, 2, 1000)]
    assert moved == [0, held * 3 // 7, int(held * (1 - (4 / 7) ** 2)), held]
    text = describe(program, SIZES, float_bytes)
    assert "Experts 3 of 7 +shared" in text
    assert "layers.1.gate_up" in text, "a dense layer between"


def test_bytes_count_weights_once_and_kv_as_attended(program: Program) -> None:
    def moved(kv_bytes: int, context_len: int) -> int:
        return cost_of(program.nodes, Sizes(1, 1, context_len), float_bytes, kv_bytes=kv_bytes).moved

    assert moved(4, 50) - moved(4, 49) == 2 * (2 * 2 * 24) * 4  # two global layers, K and V of two heads
    assert moved(4, 50) > moved(2, 50) > sum(float_bytes(w) for w in program.weights)


def test_table_folds_equal_layers_and_totals_hold(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    program = record(read_spec(make_tiny("gemma3", tmp_path, num_hidden_layers=6, layer_types=kinds)))
    text = describe(program, SIZES, float_bytes)
    assert "layers.3 as layers.1" in text
    assert "layers.4 as layers.2" in text
    assert "layers.2.attention" in text  # layer 0 has no residual to add in its first norm, so 2 is a kind of its own
    assert "layers.5.gather" in text  # the last layer goes on with fewer rows, so it is one too
    assert "Attention window 5" in text
    assert "Linear gelu_tanh_mul" in text
    total = next(line for line in text.splitlines() if line.startswith("total"))
    resident = sum(float_bytes(w) for w in program.weights)
    assert f"{len(program.nodes)} nodes" in total
    assert f"{resident / 1024:.1f} KiB" in total
    assert f"{program.kv_elements_per_block(1) * 4 / 1024:.1f} KiB a token" in text


def test_columns_line_up(program: Program) -> None:
    table = describe(program, SIZES, float_bytes).split("\n\n")[0].splitlines()
    op_column = table[0].index("op")
    assert all(line[op_column - 2 : op_column] == "  " for line in table)
    assert len({len(line) for line in table}) == 1
