"""From a SchedulerOutput and the rows to the host arrays of one step."""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from octavo.runtime.base import Int32, Int64, SamplingInputs, StepInputs
from octavo.step import ScheduledRow
from octavo.worker.pools import Pool
from octavo.worker.rows import Rows, RowTokens


@dataclass(slots=True)
class Batch:
    """The arrays of one step, and which scheduled rows get a token."""

    inputs: StepInputs
    sampling: SamplingInputs
    samples: list[bool]  # per scheduled row
    tokens_of: RowTokens  # of the first of the R positions, in the order of logits_indices
    prompts: list[tuple[int, int]] = field(default_factory=list)  # (row, positions) of the prompts that fill the others
    # (place, or -1 where its prompt goes on; row, positions, pool) of prompts that are embedded
    pooled: list[tuple[int, int, int, Pool]] = field(default_factory=list)
    is_decode: bool = False  # one token for each row
    wanted: list[int] | None = None  # sampling.num_logprobs, once it was asked for


def build_batch(scheduled: list[ScheduledRow], rows: Rows) -> Batch:
    """Gathers the step's tokens, positions, slots and tables; T tokens over B requests, R of which sample."""
    pools = rows.pools
    if all(s.num_tokens == 1 and s.samples and s.row not in pools for s in scheduled):
        return _decode(scheduled, rows)
    does_sample = [s.samples and s.row not in pools for s in scheduled]
    told = [s for s in scheduled if s.num_tokens and rows.tells_prompt(s.row, s.start)]
    pooled = [(place, s, pools[s.row]) for place, s in enumerate(scheduled) if s.row in pools]
    sampled = [s for s, does in zip(scheduled, does_sample, strict=True) if does]
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
    seq_lens = start + count

    logits_row = np.fromiter((s.row if s.fork_of < 0 else s.fork_of for s in sampled), np.int32, len(sampled))
    end_of_row = np.zeros(len(rows.token_ids), np.int32)
    end_of_row[row] = query_start_loc[1:]
    sampled_row = np.fromiter((s.row for s in sampled), np.int32, len(sampled))
    sampled_len = np.fromiter((s.start + s.num_tokens for s in sampled), np.int32, len(sampled))
    inputs = StepInputs(
        token_ids=rows.tokens_at(token_row, positions),
        positions=positions,
        slots=_slots(rows, token_row, positions),
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_tables=_tables(rows, row, seq_lens),
        logits_indices=end_of_row[logits_row] - 1,
    )
    batch = Batch(inputs, _sampling(rows, sampled_row, sampled_len), does_sample, rows.expect(sampled_row, sampled_len))
    if told:
        _add_prompts(batch, told, rows, query_end=end_of_row)
    if pooled:
        _add_states(batch, pooled, query_end=end_of_row)
    return batch


def _add_prompts(batch: Batch, told: list[ScheduledRow], rows: Rows, *, query_end: Int32) -> None:
    """Adds the positions of prompts whose next token's log probability is wanted, behind those that sample."""
    indices, tokens, wanted = [], [], []
    for item in told:
        end = min(item.start + item.num_tokens, int(rows.num_prompt_tokens[item.row]) - 1)
        count = end - item.start
        first = query_end[item.row] - item.num_tokens
        batch.prompts.append((item.row, count))
        indices.append(np.arange(first, first + count, dtype=np.int32))
        tokens.append(rows.token_ids[item.row, item.start + 1 : item.start + 1 + count])
        wanted.append(np.full(count, rows.num_prompt_logprobs[item.row], np.int32))
    batch.inputs.logits_indices = np.concatenate((batch.inputs.logits_indices, *indices))
    batch.sampling = batch.sampling.followed_by(np.concatenate(tokens), np.concatenate(wanted))


def _decode(scheduled: list[ScheduledRow], rows: Rows) -> Batch:
    """The common step: every row computes one token and samples the next. What build_batch would make, in half the
    time; with one stream, this is most of what the host does."""
    num_rows = len(scheduled)
    row = np.array([s.row for s in scheduled], np.int32)
    positions = np.array([s.start for s in scheduled], np.int32)
    seq_lens = positions + np.int32(1)
    inputs = StepInputs(
        token_ids=rows.tokens_at(row, positions),
        positions=positions,
        slots=_slots(rows, row, positions),
        query_start_loc=_count(num_rows + 1),
        seq_lens=seq_lens,
        block_tables=_tables(rows, row, seq_lens),
        logits_indices=_count(num_rows),
    )
    return Batch(inputs, _sampling(rows, row, seq_lens), [True] * num_rows, rows.expect(row, seq_lens), is_decode=True)


def _add_states(batch: Batch, pooled: list[tuple[int, ScheduledRow, Pool]], *, query_end: Int32) -> None:
    """Adds the positions of prompts that are embedded whose last states count."""
    indices = [batch.inputs.logits_indices]
    for place, item, pool in pooled:
        count = int(item.samples) if pool.last else item.num_tokens
        batch.pooled.append((place if item.samples else -1, item.row, count, pool))
        indices.append(np.arange(query_end[item.row] - count, query_end[item.row], dtype=np.int32))
    batch.inputs.logits_indices = np.concatenate(indices)
    batch.inputs.num_states = sum(map(len, indices[1:]))


@lru_cache(maxsize=4096)
def _count(num: int) -> Int32:
    """0, 1, 2, ...; shared, so never written."""
    return np.arange(num, dtype=np.int32)


def _slots(rows: Rows, token_row: Int32, positions: Int32) -> Int64:
    """Where the KV of each token goes, [G, T]."""
    block, offset = np.divmod(positions, rows.block_size)
    slots = rows.block_tables[:, token_row, block].astype(np.int64)
    slots *= rows.block_size
    slots += offset
    return np.ascontiguousarray(slots)


def _tables(rows: Rows, row: Int32, seq_lens: Int32) -> Int32:
    """Block tables of the step's requests, as wide as the longest needs, [G, B, blocks]."""
    num_blocks = -(-int(seq_lens.max(initial=1)) // rows.block_size)
    return np.ascontiguousarray(rows.block_tables[:, row, :num_blocks])


def _sampling(rows: Rows, row: Int32, seq_lens: Int32) -> SamplingInputs:
    drawn = seq_lens - rows.num_prompt_tokens[row]  # tokens generated so far: the counter of the noise
    bias_start, bias_ids, bias_values = rows.biases(row, drawn)
    seen_start, seen_ids, seen_counts = rows.seen(row)
    return SamplingInputs(
        positions=drawn.astype(np.int64),
        bias_start=bias_start,
        bias_ids=bias_ids,
        bias_values=bias_values,
        seen_start=seen_start,
        seen_ids=seen_ids,
        seen_counts=seen_counts,
        rows=row,
        **rows.settings(row),
    )
