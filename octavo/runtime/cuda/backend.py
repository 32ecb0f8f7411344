"""Whose attention kernels run: Triton's, or the C++ ones where they were measured to be faster (docs/kernels.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from octavo.errors import ConfigError, UnsupportedError
from octavo.program.ops import Attention
from octavo.runtime.cuda import operators
from octavo.runtime.cuda.kernels import attention

log = logging.getLogger("octavo.runtime")


class AttentionBackend:
    """Chooses for each launch. What C++ needs is built in a thread, which the weights need not wait for.

    Args:
        name: "triton"; "cuda" for C++ kernels wherever there is one; "auto" for where they are faster.
        dtype: what is computed in; the C++ kernels know bfloat16 alone.
        device: where.

    Raises:
        UnsupportedError: "cuda" in another type.
    """

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        self._is_asked_for = name == "cuda"
        self._dtype = dtype
        self._built: Future[None] | None = None
        # whether there are C++ kernels; whether products of many rows, and a lone request's attention, write such KV
        self.has_cpp = self.writes_kv = self.turns = False
        self.prefill: Callable[..., None] = attention.prefill_attention
        if self._is_asked_for and dtype != torch.bfloat16:
            raise UnsupportedError(f"--attention-backend cuda: its kernels compute in bfloat16, not {dtype}: take auto")
        if name != "triton" and dtype == torch.bfloat16 and device.type == "cuda":
            pool = ThreadPoolExecutor(1)
            self._built = pool.submit(operators.load)
            pool.shutdown(wait=False)

    def prepare(self, nodes: Sequence[Attention], block_size: int, kv_bytes: int, *, waits: bool = True) -> int:
        """Chooses the prefill kernel for a KV pool; returns the queries of its tiles.

        Unless it `waits`, C++ kernels that are still being built are none: the time is good for compiling Triton's.

        Raises:
            ConfigError: C++ kernels were asked for and cannot be built.
            UnsupportedError: attention layers of several shapes.
        """
        if self._built is not None and (waits or self._built.done()):
            self.has_cpp, self._built = self._can_build(self._built), None
        self.writes_kv = self.has_cpp and block_size == 16 and kv_bytes <= 2
        self.turns = self.writes_kv and all(operators.can_decode(n, block_size, kv_bytes) for n in nodes)
        in_cpp = self.has_cpp and all(operators.can_prefill(n, block_size, kv_bytes) for n in nodes)
        self.prefill = operators.prefill_attention if in_cpp else attention.prefill_attention
        tiles = set()
        for node in nodes:
            group = node.num_heads // node.num_kv_heads
            rows = attention.queries_per_tile(node.head_dim, group, self._dtype.itemsize)
            tiles.add(operators.PREFILL_ROWS // group if in_cpp else rows)
        if len(tiles) > 1:
            raise UnsupportedError("the cuda runtime needs attention layers of one shape: take --runtime native")
        return tiles.pop() if tiles else 1

    def decode(self, node: Attention, num_decodes: int, block_size: int, kv_bytes: int) -> Callable[..., None]:
        """The decode kernel for so many requests: C++ gains where few share the card, and with narrow KV."""
        if self.has_cpp and operators.can_decode(node, block_size, kv_bytes):
            is_small = num_decodes * node.num_kv_heads <= operators.FEW_PROGRAMS
            if self._is_asked_for or is_small or kv_bytes == 1:
                return operators.decode_attention
        return attention.decode_attention

    def _can_build(self, built: Future[None]) -> bool:
        """Waits; where it fails and may, Triton's kernels are as right."""
        try:
            built.result()
        except ConfigError as error:
            if self._is_asked_for:
                raise
            log.info("attention by Triton alone: %s", error)
            return False
        return True
