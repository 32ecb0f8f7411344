"""The batch of each step; of rows that decode again and again, the arrays of their last step, counted on in place.

Between two steps the weights pass through the caches, and whatever the host then calls for the first time costs it
30 us: with one stream, calls into numpy were most of a step. So these rows go on by plain stores into arrays whose
addresses the runtime knows already.
"""

from dataclasses import replace

import numpy as np

from octavo.runtime.base import Int32
from octavo.step import NO_BLOCKS, ScheduledRow
from octavo.worker.batch import Batch, build_batch
from octavo.worker.rows import Rows

SPARE_BLOCKS = 8  # columns of the block tables beyond what the longest row needs


class Batches:
    """Makes the batch of each step: the last one counted on where it can be, else built from the rows."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._steady: SteadyBatch | None = None  # of the last step, where it was a decode that may go on

    def next(self, scheduled: list[ScheduledRow]) -> Batch:
        """The arrays of a step whose new rows and blocks the rows know already."""
        if self._steady is not None and self._steady.go_on(scheduled):
            return self._steady.batch
        self._steady = None
        return build_batch(scheduled, self._rows)

    def take(self, batch: Batch, token_ids: Int32) -> list[int]:
        """Puts the tokens of a decode where the rows' next ones read them; the same as a list."""
        rows, steady = self._rows, self._steady
        if steady is not None and steady.batch is batch and batch.tokens_of.total_admissions == rows.total_admissions:
            tokens = steady.take(token_ids)
        else:
            tokens = token_ids.tolist()
            rows.append(batch.tokens_of, token_ids)
            self._steady = SteadyBatch(batch, rows) if rows.are_plain else None
        if batch.sampling.mask_of is not None:
            self._steady = None
        return tokens


class SteadyBatch:
    """A decode batch (one token for each row, none with a bias, a penalty or a mask) whose tokens are known."""

    def __init__(self, batch: Batch, rows: Rows) -> None:
        self.batch = batch
        self._all_rows = rows
        self._is_open = False
        self._is_taken = True  # the tokens of its last step are in the rows
        self._admissions = batch.tokens_of.total_admissions
        self._told: Int32 | None = None  # where the runtime left the last tokens: most do so in the same array again

    def go_on(self, scheduled: list[ScheduledRow]) -> bool:
        """Makes the arrays those of this step; False, with nothing changed, where it is not one more token for each of
        the same rows. The rows know the step's new blocks already."""
        if not self._is_taken or self._admissions != self._all_rows.total_admissions:
            return False
        if len(scheduled) != len(self.batch.samples):
            return False
        if not self._is_open:
            if scheduled[0].start != self.batch.inputs.seq_lens[0]:  # where steps run ahead, always
                return False
            self._open()
        for item, row, position in zip(scheduled, self._rows, self._next, strict=True):
            if item.row != row or item.start != position or item.num_tokens != 1 or not item.samples:
                return False
        size = self._all_rows.block_size
        if max(self._next) // size >= self._width:
            return False
        for at, item in enumerate(scheduled):
            position = item.start
            self._positions[at] = position
            self._lengths[at] = self._next[at] = position + 1
            self._drawn[at] += 1
            for group in self._groups:
                if position % size and item.new_block_ids is NO_BLOCKS:
                    self._slots[group, at] += 1
                else:
                    block = self._row_tables[group, item.row, position // size]
                    self._tables[group, at, position // size] = block
                    self._slots[group, at] = block * size + position % size
        self._is_taken = False
        return True

    def take(self, token_ids: Int32) -> list[int]:
        """Puts the tokens of the step where the rows' next ones read them; the same as a list."""
        if token_ids is not self._told:
            self._told, self._view = token_ids, token_ids.data
        tokens: list[int] = self._view.tolist()
        for at, token in enumerate(tokens):
            row, position = self._rows[at], self._next[at]
            self._row_ids[row, position] = self._ids[at] = token
            self._row_lengths[row] = position + 1
        self._is_taken = True
        return tokens

    def _open(self) -> None:
        rows = self._all_rows
        inputs = self.batch.inputs = replace(self.batch.inputs)  # what a runtime knows of the old one ends here
        num_groups, num_rows, width = inputs.block_tables.shape
        whole = min(width + SPARE_BLOCKS, rows.block_tables.shape[-1])
        tables = np.zeros((num_groups, num_rows, whole), np.int32)
        tables[:, :, :width] = inputs.block_tables
        inputs.block_tables = tables
        self._width = whole
        self._groups = range(num_groups)
        self._rows: list[int] = self.batch.tokens_of.rows.tolist()
        self._next: list[int] = inputs.seq_lens.tolist()  # position of each row's next token
        inputs.token_ids[:] = rows.token_ids[self.batch.tokens_of.rows, inputs.seq_lens]
        self._ids, self._positions = inputs.token_ids.data, inputs.positions.data
        self._lengths, self._drawn = inputs.seq_lens.data, self.batch.sampling.positions.data
        self._slots, self._tables = inputs.slots.data, tables.data
        self._row_ids, self._row_lengths = rows.token_ids.data, rows.num_tokens.data
        self._row_tables = rows.block_tables.data
        self._is_open = True
