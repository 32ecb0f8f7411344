"""The worker's rows: one per running Request, persistent host arrays that each step patches and gathers from.

A Request keeps its row from admission to finish or preemption, so a step costs its differences, not its state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from octavo.runtime.base import Float32, Int32, Int64
from octavo.step import NO_BLOCKS, NewRow, ScheduledRow
from octavo.worker.pools import Pool

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")  # of params
_SETTINGS: dict[str, type[np.generic]] = dict.fromkeys(_FLOATS, np.float32)
_SETTINGS |= {"top_k": np.int32, "num_logprobs": np.int32, "seeds": np.uint64}
Value = TypeVar("Value", np.float32, np.int32)


@dataclass(slots=True)
class RowTokens:
    """Tokens that a step samples: whose they are, and where they go, for when they are known."""

    rows: Int32  # [R]
    positions: Int32  # [R]
    admissions: Int64  # [R]: of each row, so that a token is not given to the row's next Request
    total_admissions: int  # of all rows


class Rows:
    """Token ids, block tables and sampling state by row.

    token_ids     int32 [rows, max_model_len + 1]   prompt and generated (lazily touched)
    block_tables  int32 [groups, rows, max blocks]
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int, num_groups: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        self.block_size = block_size
        self.token_ids = np.zeros((num_rows, max_model_len + 1), np.int32)
        self.block_tables = np.zeros((num_groups, num_rows, max_blocks), np.int32)
        self.num_blocks = np.zeros((num_groups, num_rows), np.int32)
        self.num_tokens = np.zeros(num_rows, np.int32)  # known here; later ones are still on the device
        self.num_admissions = np.zeros(num_rows, np.int64)
        self.total_admissions = 0
        self.num_prompt_tokens = np.zeros(num_rows, np.int32)
        self._sampling = {name: np.zeros(num_rows, dtype) for name, dtype in _SETTINGS.items()}  # as SamplingInputs
        self.num_prompt_logprobs = np.full(num_rows, -1, np.int32)
        self.pools: dict[int, Pool] = {}
        self._settings: tuple[bytes | None, dict[str, npt.NDArray[Any]]] = (None, {})  # of the rows of the last step
        self._bias: dict[int, RowBias] = {}
        self._seen: dict[int, dict[int, int]] = {}  # row -> token id -> times generated

    def admit(self, new: NewRow) -> None:
        """Writes a row whole: a Request was admitted, or came back after a preemption."""
        row, params = new.row, new.params
        self.token_ids[row, : len(new.token_ids)] = new.token_ids
        self.num_tokens[row] = len(new.token_ids)
        self.num_admissions[row] += 1
        self.total_admissions += 1
        self.num_prompt_tokens[row] = new.num_prompt_tokens
        for group, ids in enumerate(new.block_ids):
            self.block_tables[group, row, : len(ids)] = ids
            self.num_blocks[group, row] = len(ids)
        settings: dict[str, Any] = {name: getattr(params, name) for name in _FLOATS}
        settings |= {"top_k": max(params.top_k, 0), "num_logprobs": new.num_logprobs, "seeds": new.seed & (1 << 64) - 1}
        for name, value in settings.items():
            self._sampling[name][row] = value
        self.num_prompt_logprobs[row] = new.num_prompt_logprobs
        self._settings = (None, {})
        self._bias.pop(row, None)
        self._seen.pop(row, None)
        self.pools.pop(row, None)
        if new.pooling is not None:
            self.pools[row] = Pool(last=new.pooling == "last")
        if params.logit_bias or params.min_tokens:
            self._bias[row] = RowBias(params.logit_bias or {}, new.stop_ids, params.min_tokens)
        if params.has_penalties:
            seen = dict.fromkeys(new.token_ids[: new.num_prompt_tokens], 0)
            for token in new.token_ids[new.num_prompt_tokens :]:
                seen[token] = seen.get(token, 0) + 1
            self._seen[row] = seen

    def extend_tables(self, scheduled: list[ScheduledRow]) -> None:
        """Appends the blocks that this step added to running rows."""
        for item in scheduled:
            for group, ids in enumerate(item.new_block_ids if item.new_block_ids is not NO_BLOCKS else ()):
                if ids:
                    start = self.num_blocks[group, item.row]
                    self.block_tables[group, item.row, start : start + len(ids)] = ids
                    self.num_blocks[group, item.row] = start + len(ids)

    def tokens_at(self, rows: Int32, positions: Int32) -> Int32:
        """Token ids at these positions of these rows; -1 - row where a step in flight has yet to sample it."""
        token_ids: Int32 = self.token_ids[rows, positions]
        pending = positions >= self.num_tokens[rows]
        if pending.any():
            token_ids[pending] = -1 - rows[pending]
        return token_ids

    def expect(self, rows: Int32, positions: Int32) -> RowTokens:
        """What a step will sample for these rows."""
        return RowTokens(rows, positions, self.num_admissions[rows], self.total_admissions)

    def append(self, of: RowTokens, token_ids: Int32) -> None:
        """Writes the tokens that became known, where the rows' next steps read them; not into rows given away since."""
        rows, positions = of.rows, of.positions
        if of.total_admissions != self.total_admissions:
            own = of.admissions == self.num_admissions[rows]
            rows, positions, token_ids = rows[own], positions[own], token_ids[own]
        self.token_ids[rows, positions] = token_ids
        self.num_tokens[rows] = positions + 1
        if self._seen:
            for row, token in zip(rows.tolist(), token_ids.tolist(), strict=True):
                if (seen := self._seen.get(row)) is not None:
                    seen[token] = seen.get(token, 0) + 1

    @property
    def are_plain(self) -> bool:
        """Whether no row has a bias or a penalty."""
        return not (self._bias or self._seen)

    def tells_prompt(self, row: int, start: int) -> bool:
        """Whether log probabilities are wanted of prompt tokens behind position `start`."""
        return bool(self.num_prompt_logprobs[row] >= 0 and start + 1 < self.num_prompt_tokens[row])

    def settings(self, rows: Int32) -> dict[str, npt.NDArray[Any]]:
        """Sampling settings of these rows by the names of SamplingInputs; the same arrays from step to step while the
        rows and their Requests are the same, so that a runtime need not look at them again."""
        key = rows.tobytes()
        if self._settings[0] != key:
            self._settings = (key, {name: of_row[rows] for name, of_row in self._sampling.items()})
        return self._settings[1]

    def biases(self, rows: Int32, drawn: Int32) -> tuple[Int32, Int32, Float32]:
        """Logit biases of these rows as (start [R + 1], ids, values); `drawn`: tokens generated so far."""
        if not self._bias:
            return _none(len(rows), np.float32)
        pairs = zip(rows.tolist(), drawn.tolist(), strict=True)
        return _ragged([b.at(n) if (b := self._bias.get(row)) else {} for row, n in pairs], np.float32)

    def seen(self, rows: Int32) -> tuple[Int32, Int32, Int32]:
        """Distinct tokens seen by rows with penalties as (start [R + 1], ids, times generated)."""
        if not self._seen:
            return _none(len(rows), np.int32)
        return _ragged([self._seen.get(row, {}) for row in rows.tolist()], np.int32)


class RowBias:
    """What is added to a row's logits: its logit_bias, and -inf on stop ids until min_tokens were generated."""

    def __init__(self, logit_bias: dict[int, float], stop_ids: frozenset[int], min_tokens: int) -> None:
        self._always = logit_bias
        self._early = {**logit_bias, **dict.fromkeys(stop_ids, -np.inf)}
        self._min_tokens = min_tokens

    def at(self, num_generated: int) -> dict[int, float]:
        """Token id -> bias when `num_generated` tokens exist."""
        return self._early if num_generated < self._min_tokens else self._always


@lru_cache(maxsize=256)
def _none(num_rows: int, dtype: type[Value]) -> tuple[Int32, Int32, npt.NDArray[Value]]:
    """No entry for any row; shared, so never written."""
    return _ragged([{}] * num_rows, dtype)


def _ragged(entries: Sequence[Mapping[int, float]], dtype: type[Value]) -> tuple[Int32, Int32, npt.NDArray[Value]]:
    start = np.zeros(len(entries) + 1, np.int32)
    np.cumsum([len(e) for e in entries], out=start[1:])
    ids = np.fromiter((token for e in entries for token in e), np.int32, start[-1])
    values: npt.NDArray[Value] = np.fromiter((value for e in entries for value in e.values()), dtype, start[-1])
    return start, ids, values
