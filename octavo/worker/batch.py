"""From a SchedulerOutput and the rows to the host arrays of one step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.runtime.base import SamplingInputs, StepInputs
from octavo.step import ScheduledRow
from octavo.worker.rows import Rows, RowTokens


@dataclass(slots=True)
class Batch:
    """The arrays of one step, and which scheduled rows get a token."""

    inputs: StepInputs
    sampling: SamplingInputs
    samples: list[bool]  # per scheduled row
    tokens_of: RowTokens  # R of them, in the order of logits_indices


def build_batch(scheduled: list[ScheduledRow], rows: Rows) -> Batch:
    """Gathers the step's tokens, positions, slots and tables; T tokens over B requests, R of which sample."""
    does_sample = [s.samples for s in scheduled]
    sampled = [s for s in scheduled if s.samples]
    scheduled = [s for s in scheduled if s.num_tokens]  # a fork computes nothing: it samples from another row's logits
    num_reqs = len(scheduled)
    row = np.fromiter((s.row for s in scheduled), np.int32, num_reqs)
    start = np.fromiter((s.start for s in scheduled), np.int32, num_reqs)
    count = np.fromiter((s.num_tokens for s in scheduled), np.int32, num_reqs)
    query_start_loc = np.zeros(num_reqs + 1, np.int32)
    np.cumsum(count, out=query_start_loc[1:])

    of_request = np.repeat(np.arange(num_reqs, dtype=np.int32), count)  # [T]
    positions = np.arange(query_start_loc[-1], dtype=np.int32) + (start - query_start_loc[:-1])[of_request]
    token_row = row[of_request]
    block, offset = np.divmod(positions, rows.block_size)
    slots = rows.block_tables[:, token_row, block].astype(np.int64) * rows.block_size + offset  # [G, T]
    seq_lens = start + count
    num_blocks = -(-int(seq_lens.max(initial=1)) // rows.block_size)

    logits_row = np.fromiter((s.row if s.fork_of < 0 else s.fork_of for s in sampled), np.int32, len(sampled))
    end_of_row = np.zeros(len(rows.token_ids), np.int32)
    end_of_row[row] = query_start_loc[1:]
    sampled_row = np.fromiter((s.row for s in sampled), np.int32, len(sampled))
    sampled_len = np.fromiter((s.start + s.num_tokens for s in sampled), np.int32, len(sampled))
    inputs = StepInputs(
        token_ids=rows.tokens_at(token_row, positions),
        positions=positions,
        slots=np.ascontiguousarray(slots),
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_tables=np.ascontiguousarray(rows.block_tables[:, row, :num_blocks]),
        logits_indices=end_of_row[logits_row] - 1,
    )
    return Batch(
        inputs,
        _sampling(rows, sampled_row, sampled_len),
        does_sample,
        rows.expect(sampled_row, sampled_len),
    )


def _sampling(rows: Rows, row: npt.NDArray[np.int32], seq_lens: npt.NDArray[np.int32]) -> SamplingInputs:
    drawn = seq_lens - rows.num_prompt_tokens[row]  # tokens generated so far: the counter of the noise
    row_list, drawn_list = row.tolist(), drawn.tolist()
    bias_start, bias_ids, bias_values = rows.biases(row_list, drawn_list)
    seen_start, seen_ids, seen_counts = rows.seen(row_list)
    return SamplingInputs(
        temperature=rows.temperature[row],
        top_k=rows.top_k[row],
        top_p=rows.top_p[row],
        min_p=rows.min_p[row],
        seeds=rows.seeds[row],
        positions=drawn.astype(np.int64),
        num_logprobs=rows.num_logprobs[row],
        bias_start=bias_start,
        bias_ids=bias_ids,
        bias_values=bias_values,
        repetition_penalty=rows.repetition_penalty[row],
        presence_penalty=rows.presence_penalty[row],
        frequency_penalty=rows.frequency_penalty[row],
        seen_start=seen_start,
        seen_ids=seen_ids,
        seen_counts=seen_counts,
        rows=row,
    )
