"""The memory plan: what weights take, what is left for KV, how many tokens and requests that is; explained at start."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from octavo import cgroup
from octavo.errors import ConfigError, MemoryPlanError
from octavo.step import most_blocks

log = logging.getLogger("octavo.worker")

CPU_KV_SHARE = 0.4  # of the free memory, unless --kv-cache-memory-bytes says otherwise
PREFERRED_SHARE = 0.5  # of the free memory: the most that weights take in a form that nobody asked for
MIB = 1 << 20
_WHAT_IS_LEFT = "what --gpu-memory-utilization leaves"


@dataclass(frozen=True, slots=True)
class Appetite:
    """What a request takes of the pool."""

    block_size: int
    windows: tuple[int, ...] = (0,)  # per KV group (Program.kv_windows)
    step_tokens: int = 1 << 30

    def blocks_for(self, num_tokens: int) -> int:
        """Most blocks that a request of so many tokens holds."""
        return most_blocks(num_tokens, self.block_size, self.windows, self.step_tokens)

    def longest(self, num_blocks: int, wanted: int) -> int:
        """The most tokens, up to `wanted`, of a request that so many blocks hold."""
        return bisect_right(range(1, wanted + 1), num_blocks, key=self.blocks_for)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes and what they hold. Printed by `describe`."""

    free_bytes: int
    weight_bytes: int
    arena_bytes: int
    block_bytes: int
    appetite: Appetite
    kv_dtype: str
    max_model_len: int
    on_device: bool = False  # the memory is a GPU's
    num_blocks: int = 0
    reason: str = ""  # why the pool has this size
    num_host_blocks: int = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens of requests of the model length that fill the pool."""
        return self.num_blocks * self.max_model_len // self.appetite.blocks_for(self.max_model_len)

    def measured(self, free_bytes: int) -> MemoryPlan:
        """The plan after the largest step ran with the weights loaded, when so much of the device may go to KV.

        Raises MemoryPlanError: not one request of the model length fits.
        """
        taken = replace(self, arena_bytes=max(self.free_bytes - self.weight_bytes - free_bytes, 0))
        if self.reason != _WHAT_IS_LEFT:
            return taken
        num_blocks = free_bytes // self.block_bytes
        if num_blocks < self.appetite.blocks_for(self.max_model_len):
            raise MemoryPlanError(
                f"after weights and the largest step {free_bytes / MIB:,.0f} MiB are left for KV: too little for one "
                f"request of {self.max_model_len:,} tokens. Lower --max-model-len or --max-num-batched-tokens"
            )
        return replace(taken, num_blocks=num_blocks)

    def describe(self) -> str:
        """The plan as lined-up text."""
        per_request = self.appetite.blocks_for(self.max_model_len)
        whose = "of the GPU, within --gpu-memory-utilization" if self.on_device else "of this machine or its cgroup"
        rows = [
            ("memory free", self.free_bytes, f"{whose}, before loading"),
            ("weights", self.weight_bytes, "packed, resident"),
            ("activations", self.arena_bytes, "for the largest step"),
            (
                "KV cache",
                self.kv_bytes,
                f"{self.reason}: {self.num_blocks:,} blocks of {self.appetite.block_size}, {self.kv_dtype}",
            ),
        ]
        if self.num_host_blocks:
            taken = self.num_host_blocks * self.block_bytes
            rows.append(("host memory", taken, f"{self.num_host_blocks:,} blocks for evicted prefixes; --swap-space"))
        lines = [f"  {name:<11} {size / MIB:>9,.1f} MiB  {note}" for name, size, note in rows]
        whole = self.num_blocks // per_request
        lines.append(f"  that holds  {self.num_tokens:>9,} tokens: {whole:,} requests of {self.max_model_len:,} tokens")
        return "\n".join(lines)


def plan_memory(
    plan: MemoryPlan,
    *,
    max_num_seqs: int,
    len_is_fixed: bool,
    kv_cache_memory_bytes: int | None,
    num_blocks_override: int | None,
    swap_bytes: int = 0,
    host_free_bytes: int = 0,
) -> MemoryPlan:
    """Sizes the KV pool of a plan, whose model length is the one asked for (`len_is_fixed`) or the model's own: then it
    is cut to what fits. Of a device all is taken that --gpu-memory-utilization allows.

    `swap_bytes`: host memory for evicted blocks; of `host_free_bytes` beside a device, else of what the rest leaves.

    Raises:
        MemoryPlanError: weights do not fit, or a fixed length or the swap space does not; with the numbers and the
            largest that would.
    """
    block_bytes, appetite, wanted_len = plan.block_bytes, plan.appetite, plan.max_model_len
    left = plan.free_bytes - plan.weight_bytes - plan.arena_bytes
    if left <= 0:
        raise MemoryPlanError(
            f"the model needs {plan.weight_bytes / MIB:,.0f} MiB for weights and {plan.arena_bytes / MIB:,.0f} MiB for "
            f"activations, but only {plan.free_bytes / MIB:,.0f} MiB are free: take a smaller model, free memory, or "
            "--dtype quantized (a GGUF file) or bfloat16"
        )
    most_useful = max_num_seqs * appetite.blocks_for(wanted_len)
    if num_blocks_override is not None:
        num_blocks, reason = num_blocks_override, "--num-gpu-blocks-override"
    elif kv_cache_memory_bytes is not None:
        num_blocks, reason = kv_cache_memory_bytes // block_bytes, "--kv-cache-memory-bytes"
    elif plan.on_device:
        num_blocks, reason = left // block_bytes, _WHAT_IS_LEFT
    else:
        share = int(CPU_KV_SHARE * left) // block_bytes
        if most_useful <= share:
            num_blocks, reason = most_useful, "max_num_seqs x max_model_len"
        else:
            num_blocks, reason = share, f"{CPU_KV_SHARE:.0%} of free memory"
    if num_blocks * block_bytes > left:
        raise MemoryPlanError(
            f"{num_blocks:,} KV blocks take {num_blocks * block_bytes / MIB:,.0f} MiB, but {left / MIB:,.0f} MiB are "
            f"left after the weights: ask for at most {left // MIB} MiB"
        )
    fitting_len = appetite.longest(num_blocks, wanted_len)
    blocks_wanted = appetite.blocks_for(wanted_len)
    if fitting_len < wanted_len and (len_is_fixed or fitting_len < 1):
        raise MemoryPlanError(
            f"one request of max_model_len={wanted_len:,} tokens needs {blocks_wanted:,} KV blocks "
            f"({blocks_wanted * block_bytes / MIB:,.1f} MiB), but the pool has {num_blocks:,} "
            f"({num_blocks * block_bytes / MIB:,.1f} MiB; {reason}): "
            + (f"the largest --max-model-len that fits is {fitting_len:,}" if fitting_len else "give it more")
        )
    left = host_free_bytes if plan.on_device else left - num_blocks * block_bytes
    num_host_blocks = _host_blocks(swap_bytes, block_bytes, left)
    return replace(
        plan, num_blocks=num_blocks, max_model_len=fitting_len, reason=reason, num_host_blocks=num_host_blocks
    )


def first_that_fits(ways: Sequence[str], plan: Callable[[str], MemoryPlan]) -> tuple[str, MemoryPlan]:
    """How weights are kept, and the plan with them: the first of `ways` that fits and takes at most half of the free
    memory, else the last, whatever it takes. Says why an earlier one was left out.

    Raises MemoryPlanError: the last does not fit.
    """
    for way in ways[:-1]:
        try:
            found = plan(way)
            if found.weight_bytes <= PREFERRED_SHARE * found.free_bytes:
                return way, found
            why = f"it takes {found.weight_bytes / MIB:,.0f} of {found.free_bytes / MIB:,.0f} MiB free, more than half"
        except MemoryPlanError as error:
            why = str(error)
        plan(ways[-1])  # where that does not fit either, its error says it all
        log.warning("weights are kept %s instead of %s, which is faster: %s", ways[-1], way, why)
    return ways[-1], plan(ways[-1])


def _host_blocks(swap_bytes: int, block_bytes: int, left: int) -> int:
    if swap_bytes > left:
        raise MemoryPlanError(
            f"--swap-space asks for {swap_bytes / MIB:,.0f} MiB of host memory, but {left / MIB:,.0f} MiB are left: "
            f"give at most {left / (1 << 30):.2f} (GiB)"
        )
    if 0 < swap_bytes < block_bytes:
        raise MemoryPlanError(
            f"--swap-space holds no KV block: one takes {block_bytes / MIB:,.1f} MiB; give at least "
            f"{block_bytes / (1 << 30):.4f} (GiB), or 0 for none"
        )
    return swap_bytes // block_bytes


def free_memory() -> int:
    """Bytes this process may still take: the machine's available memory, or what its cgroup leaves, if less."""
    limits = [limit for limit in (_meminfo_available(), cgroup.memory_left()) if limit is not None]
    if not limits:
        raise ConfigError("cannot tell the free memory of this system: give --kv-cache-memory-bytes")
    return max(min(limits), 0)


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return _sysctl_memory()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _sysctl_memory() -> int | None:
    """macOS has no /proc: total memory is the best bound at hand."""
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
