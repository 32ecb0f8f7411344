"""KV blocks in pinned host memory, and copies between them and the pool, in the order of the steps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch

from octavo.errors import MemoryPlanError
from octavo.runtime.cuda.kernels import blocks

Pair = tuple[int, int]
_WORD = torch.int64  # what is copied at a time


class HostBlocks:
    """`num_blocks` host blocks for every tensor of the pool; their ids begin at `first`.

    Copies are queued on the stream that the steps run on, so nothing needs an event: what a step saves was written by
    the steps before it, and what it loads is there when it computes. The host waits for none of them. A block that is
    saved is one that this very step gives to somebody else, so its copy could not run beside the step anyway.

    Raises:
        MemoryPlanError: the driver cannot lock so much host memory.
    """

    def __init__(self, pools: list[torch.Tensor], num_blocks: int, first: int) -> None:
        self._pools, self._first = pools, first
        self._device = pools[0].device if pools else torch.device("cpu")
        words = [pool[0].numel() * pool.itemsize // _WORD.itemsize for pool in pools]
        self._host = _locked(num_blocks * sum(words), self._device)
        hosts = [self._host[num_blocks * before :] for before in accumulate(words[:-1], initial=0)]
        places = [[p.data_ptr(), h.data_ptr(), n] for p, h, n in zip(pools, hosts, words, strict=False)]
        self._tensors = torch.tensor(places, dtype=_WORD).to(self._device)
        self._most_words = max(words, default=0)

    def copy(self, pairs: Iterable[Pair]) -> None:
        """Copies whole blocks (from, to) in all layers, as if one pair after the other."""
        for wave in waves(pairs if self._pools else ()):  # a program may have no KV
            ids = torch.tensor([[self._id(source), self._id(target)] for source, target in wave], dtype=_WORD)
            on_device = ids.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else ids
            blocks.copy_blocks(on_device, self._tensors, self._most_words)

    def _id(self, block: int) -> int:
        return block if block < self._first else self._first - block - 1


def _locked(num_words: int, device: torch.device) -> torch.Tensor:
    """Memory that a card reads and writes by its address. Pinned by torch it would take the next power of two."""
    memory = torch.empty(num_words, dtype=_WORD)
    if device.type == "cuda" and num_words:
        driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(driver.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
            raise MemoryPlanError(f"--swap-space: {memory.nbytes >> 20} MiB of the host cannot be locked: ask for less")
        weakref.finalize(memory, driver.cudaHostUnregister, memory.data_ptr())
    return memory


def waves(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Cuts pairs, in their order, where one touches what another since the last cut wrote, or writes what it read."""
    wave: list[Pair] = []
    read: set[int] = set()
    written: set[int] = set()
    for source, target in pairs:
        if source in written or target in written or target in read:
            yield wave
            wave, read, written = [], set(), set()
        wave.append((source, target))
        read.add(source)
        written.add(target)
    if wave:
        yield wave
