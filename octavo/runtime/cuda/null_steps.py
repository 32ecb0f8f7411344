"""Steps that mean nothing, for start-up: kernels are compiled, memory is measured and graphs are captured by them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from octavo.runtime.base import SamplingInputs, StepInputs
from octavo.runtime.cuda.graphs import DRAWS


def null_sampling(num_rows: int, ending: str) -> SamplingInputs:
    """Greedy, or the draw of everything that a step of this ending can hold."""
    sampling = SamplingInputs.greedy(num_rows)
    if ending == DRAWS:
        sampling.temperature += 1
    return sampling


def adjusting(sampling: SamplingInputs, vocab: int) -> SamplingInputs:
    """The same with a bias, a penalty and a mask on the first row, none of which changes anything."""
    one, first = np.zeros(1, np.int32), np.ones(len(sampling.top_k) + 1, np.int32)
    first[0] = 0
    return replace(
        sampling, bias_start=first, bias_ids=one, bias_values=np.zeros(1, np.float32), seen_start=first, seen_ids=one,
        seen_counts=one, mask_of=-first[:-1],
        masks=np.full((1, -(-vocab // 32)), 2**32 - 1, np.uint32),
    )  # fmt: skip


def null_step(counts: list[int], null_block: int, block_size: int, num_groups: int) -> StepInputs:
    """Prompts of these lengths whose KV lies, all of it, in the null block: its numbers mean nothing."""
    num_tokens, num_requests = sum(counts), len(counts)
    ends = np.cumsum(counts)
    width = -(-max(counts) // block_size)
    return StepInputs(
        token_ids=np.zeros(num_tokens, np.int32),
        positions=np.zeros(num_tokens, np.int32),
        slots=np.full((num_groups, num_tokens), null_block * block_size, np.int64),
        query_start_loc=np.concatenate(([0], ends)).astype(np.int32),
        seq_lens=np.array(counts, np.int32),
        block_tables=np.full((num_groups, num_requests, width), null_block, np.int32),
        logits_indices=(ends - 1).astype(np.int32),
    )
