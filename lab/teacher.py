"""Tokens that are known beforehand as a step of one request: what a model makes of them (teacher forcing)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octavo.runtime.base import Int32, StepInputs


def one_request(
    token_ids: Sequence[int] | Int32, *, start: int = 0, first_logits: int, block_size: int = 16
) -> StepInputs:
    """Positions `start` on of one request whose KV lies in blocks 0, 1, 2, ...; logits from `first_logits` on."""
    end = start + len(token_ids)
    positions = np.arange(start, end, dtype=np.int32)
    return StepInputs(
        token_ids=np.asarray(token_ids, np.int32),
        positions=positions,
        slots=positions.astype(np.int64)[None],
        query_start_loc=np.array([0, end - start], np.int32),
        seq_lens=np.array([end], np.int32),
        block_tables=np.arange(-(-end // block_size), dtype=np.int32)[None, None],
        logits_indices=np.arange(first_logits - start, end - start, dtype=np.int32),
    )
