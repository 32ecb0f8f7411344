"""Copies of whole KV blocks, in the pool or between it and pinned host memory: one launch for all layers and pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:  # who only compiles has no torch
    import torch

_TILE = 1024  # words of a program


@triton.jit(do_not_specialize_on_alignment=["pairs"])
def _copy(pairs, tensors, TILE: tl.constexpr):
    """Program (p, t, i) copies part i of pair p in tensor t. Ids below zero are host blocks: -1 is the first.

    `tensors` [T, 3]: where the tensor's pool begins, where its host blocks do, words of a block.
    """
    pair, tensor, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    words = tl.load(tensors + 3 * tensor + 2)
    source = _address(pairs + 2 * pair, tensors + 3 * tensor, words)
    target = _address(pairs + 2 * pair + 1, tensors + 3 * tensor, words)
    at = part * TILE + tl.arange(0, TILE)
    tl.store(target + at, tl.load(source + at, at < words), at < words)


@triton.jit
def _address(block, tensor, words):
    block = tl.load(block)
    base = tl.load(tensor + (block < 0)) + 8 * words * tl.where(block < 0, -1 - block, block)
    return base.to(tl.pointer_type(tl.int64))


def copy_blocks(pairs: torch.Tensor, tensors: torch.Tensor, most_words: int) -> None:
    """Copies pairs [N, 2] of blocks, in no order, in all `tensors` [T, 3] (see _copy); int64, on the device.

    Host memory is read and written over the bus by the kernel itself, so it has to be pinned.
    """
    _copy[(len(pairs), len(tensors), triton.cdiv(most_words, _TILE))](pairs, tensors, TILE=_TILE)
