"""Host arrays of a step: the common step's short way against the general one, and settings that follow the rows."""

import dataclasses
from random import Random

import numpy as np
import pytest

from octavo.sampling_params import SamplingParams
from octavo.step import NewRow, ScheduledRow
from octavo.worker import batch
from octavo.worker.batch import build_batch
from octavo.worker.rows import Rows
from octavo.worker.steady import Batches

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.7, top_p=0.9, logit_bias={5: 1.5}, presence_penalty=0.5)


def rows_of(*params, num_groups=2):
    rows = Rows(8, 64, 4, num_groups)
    for row, given in enumerate(params):
        admit(rows, row, given)
    return rows


def admit(rows, row, params, tokens=(7, 8, 9, 10, 11)):
    tables = tuple([10 * row + group, 10 * row + group + 5] for group in range(len(rows.block_tables)))
    rows.admit(NewRow(row, f"r{row}", row, list(tokens), 3, tables, 0, params, frozenset(), row))


def decode(*rows):
    return [ScheduledRow(row, f"r{row}", 0, 4, 1, True) for row in rows]


def arrays_of(made):
    for part in (made.inputs, made.sampling, made.tokens_of):
        for field in dataclasses.fields(part):
            yield f"{type(part).__name__}.{field.name}", getattr(part, field.name)


@pytest.mark.parametrize("chosen", [(0,), (0, 1, 2), (2, 0)])
def test_the_short_way_makes_what_the_general_one_makes(chosen, monkeypatch):
    rows = rows_of(GREEDY, DRAWN, GREEDY)
    short = build_batch(decode(*chosen), rows)
    calls = []
    monkeypatch.setattr(batch, "_decode", lambda scheduled, rows: calls.append(1))
    monkeypatch.setattr(batch, "all", lambda _: False, raising=False)
    general = build_batch(decode(*chosen), rows)
    assert calls == []
    assert short.samples == general.samples == [True] * len(chosen)
    for (name, ours), (_, theirs) in zip(arrays_of(short), arrays_of(general), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype, name
            assert ours.flags.c_contiguous, name


def test_settings_are_the_same_arrays_until_a_row_changes():
    rows = rows_of(GREEDY, GREEDY)
    first = build_batch(decode(0, 1), rows).sampling
    second = build_batch(decode(0, 1), rows).sampling
    assert second.temperature is first.temperature
    assert second.seen_start is first.seen_start
    assert build_batch(decode(1, 0), rows).sampling.seeds.tolist() == first.seeds.tolist()[::-1]
    admit(rows, 1, DRAWN)
    third = build_batch(decode(0, 1), rows).sampling
    assert third.temperature.tolist() == pytest.approx([0.0, 0.7])
    assert third.bias_ids.tolist() == [5]
    assert sorted(third.seen_ids.tolist()) == [7, 8, 9, 10, 11]


def test_a_token_is_not_given_to_the_rows_next_request():
    rows = rows_of(GREEDY, GREEDY)
    expected = build_batch(decode(0, 1), rows).tokens_of
    admit(rows, 1, GREEDY, tokens=(1, 2))
    rows.append(expected, np.array([40, 41], np.int32))
    assert rows.token_ids[0, 5] == 40
    assert rows.token_ids[1, 5] != 41
    assert rows.num_tokens[:2].tolist() == [6, 2]


def test_a_step_in_which_nothing_samples_has_settings_of_no_rows():
    rows = rows_of(GREEDY)
    made = build_batch([ScheduledRow(0, "r0", 0, 0, 3, False)], rows)
    assert made.sampling.temperature.shape == made.sampling.seeds.shape == (0,)
    assert made.inputs.logits_indices.shape == (0,)
    assert made.samples == [False]


@pytest.mark.parametrize("num_groups", [1, 2])
def test_rows_that_go_on_in_place_have_the_arrays_of_the_general_way(num_groups):
    random = Random(num_groups)
    steady, general = (
        rows_of(GREEDY, GREEDY, GREEDY, num_groups=num_groups),
        rows_of(GREEDY, GREEDY, GREEDY, num_groups=num_groups),
    )
    batches, last = Batches(steady), None
    ends, chosen, in_place = {0: 4, 1: 4, 2: 4}, [0, 1, 2], 0
    for step in range(150):
        if random.random() < 0.1:
            chosen = random.sample(range(3), random.randint(1, 3))
        for row in [row for row in chosen if random.random() < 0.02 or ends[row] > 55]:
            for rows in (steady, general):
                admit(rows, row, GREEDY, tokens=range(7 + step % 5))
            ends[row] = 6 + step % 5
        scheduled = []
        for row in chosen:
            has_block = ends[row] // 4 < steady.num_blocks[0, row]
            blocks = ((),) if has_block else tuple([100 + 7 * step + row + group] for group in range(num_groups))
            scheduled.append(ScheduledRow(row, f"r{row}", 0, ends[row], 1, True, blocks))
            ends[row] += 1
        for rows in (steady, general):
            rows.extend_tables(scheduled)
        ours, theirs = batches.next(scheduled), build_batch(scheduled, general)
        in_place += ours is last
        last = ours
        for (name, mine), (_, other) in zip(arrays_of(ours), arrays_of(theirs), strict=True):
            if name == "StepInputs.block_tables":
                assert mine.flags.c_contiguous
                held = np.arange(other.shape[-1]) * 4 < ours.inputs.seq_lens[:, None]  # what is behind is not read
                mine, other = mine[:, :, : other.shape[-1]] * held, other * held
            if name != "RowTokens.total_admissions":
                np.testing.assert_array_equal(mine, other, err_msg=name)
        tokens = np.array([random.randrange(100) for _ in chosen], np.int32)
        assert batches.take(ours, tokens) == tokens.tolist()
        general.append(theirs.tokens_of, tokens)
        np.testing.assert_array_equal(steady.token_ids, general.token_ids)
        np.testing.assert_array_equal(steady.num_tokens, general.num_tokens)
    assert in_place > 80


def test_rows_do_not_go_on_in_place_before_their_token_is_known_or_with_a_penalty():
    rows = rows_of(GREEDY)
    batches, five = Batches(rows), np.array([5], np.int32)
    first = batches.next(decode(0))
    batches.take(first, five)
    assert batches.next([ScheduledRow(0, "r0", 0, 5, 1, True)]) is first
    ahead = batches.next([ScheduledRow(0, "r0", 0, 6, 1, True)])
    assert ahead is not first
    assert ahead.inputs.token_ids.tolist() == [-1]
    admit(rows, 1, DRAWN)
    drawn = batches.next(decode(1))
    batches.take(drawn, five)
    assert batches.next([ScheduledRow(1, "r1", 0, 5, 1, True)]) is not drawn
