"""Which layers share a block table, and which share memory."""

import dataclasses

import pytest

from octavo.program.ops import Buffer, Rows
from octavo.program.program import KVLayer, Program


def program(windows: list[int], max_model_len: int = 4096, heads: list[int] | None = None) -> Program:
    heads = heads or [2] * len(windows)
    layers = tuple(KVLayer(n, 8, window=w, place=i) for i, (n, w) in enumerate(zip(heads, windows, strict=True)))
    buffer = Buffer("x", Rows.TOKENS, 8)
    return Program((), layers, buffer, buffer, 10, max_model_len)


def shape(windows: list[int], max_model_len: int = 4096) -> tuple[tuple[int, ...], int]:
    grouped = program(windows, max_model_len).with_kv_groups()
    used = {(layer.group, layer.place) for layer in grouped.kv_layers}
    assert len(used) == len(windows), "two layers of one group share memory"
    for layer, window in zip(grouped.kv_layers, windows, strict=True):
        assert layer.window == (window if window < max_model_len else 0)
        assert grouped.kv_windows[layer.group] == layer.window
    return grouped.kv_windows, len(grouped.kv_places)


@pytest.mark.parametrize(
    ("windows", "groups", "places"),
    [
        ([0] * 30, (0,), 30),
        ([64] * 32, (64,), 32),
        (([512] * 5 + [0]) * 4 + [512] * 2, (0, *[512] * 6), 4),  # Gemma 3 1B: 22 and 4 layers
        (([512] * 5 + [0]) * 3, (0, *[512] * 5), 3),  # Gemma 3 270M
        ([64, 0, 64, 0], (0, 64), 2),
        ([0, 4096, 5000, 64], (0, 0, 0, 64), 1),  # a window as long as the context is none
    ],
)
def test_groups(windows: list[int], groups: tuple[int, ...], places: int) -> None:
    assert shape(windows) == (groups, places)


def test_layers_of_different_sizes_stay_in_one_group() -> None:
    mixed = program([0, 64], heads=[2, 4])
    assert mixed.with_kv_groups() == mixed
    assert mixed.kv_windows == (0,)


def test_a_block_is_as_large_as_its_places() -> None:
    plain = program(([512] * 5 + [0]) * 3)
    grouped = plain.with_kv_groups()
    assert plain.kv_elements_per_block(16) == 6 * grouped.kv_elements_per_block(16)
    assert [dataclasses.replace(layer, group=0, place=0) for layer in grouped.kv_layers] == [
        dataclasses.replace(layer, group=0, place=0) for layer in plain.kv_layers
    ]
