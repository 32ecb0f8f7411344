"""KV blocks in pinned host memory, and copies between them and the pool, in the order of the steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class HostBlocks:
    """`num_blocks` host blocks for every tensor of the pool; their ids begin at `first`.

    Copies are queued on the stream that the steps run on, so nothing needs an event: what a step saves was written by
    the steps before it, and what it loads is there when it computes. The host waits for none of them.
    """

    def __init__(self, pools: list[torch.Tensor], num_blocks: int, first: int) -> None:
        self._pools, self._first = pools, first
        pinned = pools[0].is_cuda if pools else False
        self._host = [torch.empty((num_blocks, *p.shape[1:]), dtype=p.dtype, pin_memory=pinned) for p in pools]

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copies whole blocks (from, to) in all layers, one pair after the other."""
        for source, target in pairs:
            for pool, host in zip(self._pools, self._host, strict=True):
                self._block(pool, host, target).copy_(self._block(pool, host, source), non_blocking=True)

    def _block(self, pool: torch.Tensor, host: torch.Tensor, block: int) -> torch.Tensor:
        return pool[block] if block < self._first else host[block - self._first]
