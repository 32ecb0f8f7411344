"""The scheduler's rules, one by one, on the fake executor."""

from __future__ import annotations

import pytest
from fake import FakeExecutor, make_request, naive

from octavo.errors import ConfigError, ContextLengthError, InvalidValueError
from octavo.kvcache.manager import KVCacheManager
from octavo.messages import RequestDelta, StepRecord
from octavo.request import Request, RequestStatus
from octavo.scheduler.budget import Limits
from octavo.scheduler.policies import Policy
from octavo.scheduler.scheduler import Scheduler
from octavo.step import ModelRunnerOutput, SchedulerOutput


class Engine:
    """Scheduler and fake executor, one step at a time; everything that happened is kept."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 128,
        long_prefill_token_threshold: int = 0,
        enable_prefix_caching: bool = True,
        max_run_ahead: int = 0,
        admission_headroom: float = 0.0,
        policy: Policy | None = None,
        max_num_queued_reqs: int = 0,
        max_num_queued_tokens: int = 0,
        windows: tuple[int, ...] = (0,),
    ) -> None:
        self.kv = KVCacheManager(
            num_blocks, block_size, windows, enable_prefix_caching=enable_prefix_caching, hash_key=b"key"
        )
        self.now = 0.0
        self.scheduler = Scheduler(
            self.kv,
            Limits(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=max_model_len,
                long_prefill_token_threshold=long_prefill_token_threshold,
                max_run_ahead=max_run_ahead,
                admission_headroom=admission_headroom,
                max_num_queued_reqs=max_num_queued_reqs,
                max_num_queued_tokens=max_num_queued_tokens,
            ),
            policy=policy,
            clock=lambda: self.now,
        )
        self.executor = FakeExecutor(num_blocks, block_size, windows)
        self.outputs: list[SchedulerOutput] = []
        self.records: list[StepRecord] = []
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, RequestDelta] = {}

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def launch(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        if output.scheduled:
            self.records.append(StepRecord(step=output.step, time=0.0))
            self.scheduler.fill(self.records[-1], output)
            self.outputs.append(output)
            self.executor.execute(output)
        return output

    def land(self) -> list[RequestDelta]:
        output, result = self.executor.results.popleft()
        if result is None:
            deltas = self.scheduler.fail(output, "boom")
        else:
            deltas = self.scheduler.update(output, result)
        for delta in deltas:
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason:
                self.ends[delta.request_id] = delta
        return deltas

    def step(self) -> dict[str, int]:
        """One step at depth 1: tokens computed, by Request."""
        output = self.launch()
        self.land()
        return {item.request_id: item.num_tokens for item in output.scheduled}

    def drain(self) -> None:
        for _ in range(1000):
            if not self.scheduler.has_unfinished:
                return
            self.step()
        raise AssertionError("livelock")

    def total(self, name: str) -> int:
        return sum(getattr(record, name) for record in self.records)


def prompt(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


# ------------------------------------------------------------------------------------------------ budget and chunks


def test_prompts_and_single_tokens_share_one_budget() -> None:
    engine = Engine(max_num_batched_tokens=10)
    engine.add(make_request("a", prompt(6)), make_request("b", prompt(9, 100)))
    assert engine.step() == {"a": 6, "b": 4}
    assert engine.step() == {"a": 1, "b": 5}
    assert engine.step() == {"a": 1, "b": 1}
    assert [r.num_chunked for r in engine.records] == [1, 0, 0]
    assert [r.num_prefill_tokens for r in engine.records] == [9, 4, 0]
    engine.drain()
    assert engine.tokens == {"a": naive(prompt(6), 8)[0], "b": naive(prompt(9, 100), 8)[0]}


def test_the_long_prefill_threshold_leaves_room_for_others() -> None:
    engine = Engine(max_num_batched_tokens=10, long_prefill_token_threshold=4)
    engine.add(make_request("a", prompt(9)), make_request("b", prompt(3, 100)))
    assert engine.step() == {"a": 4, "b": 3}
    assert engine.step() == {"a": 4, "b": 1}
    assert engine.step() == {"a": 1, "b": 1}


def test_running_come_first_and_nobody_overtakes() -> None:
    engine = Engine(num_blocks=6)
    engine.add(make_request("a", prompt(12), 4))
    assert engine.step() == {"a": 12}
    engine.add(make_request("long", prompt(14, 100), 2), make_request("short", prompt(2, 200), 2))
    assert engine.step() == {"a": 1}  # `long` does not fit beside `a`, and `short` waits behind it
    assert engine.records[-1].num_waiting == 2
    engine.drain()
    order = [new.request_id for output in engine.outputs for new in output.new_rows]
    assert order == ["a", "long", "short"]


def test_rows_are_bounded_and_the_lowest_is_taken() -> None:
    engine = Engine(max_num_seqs=2)
    engine.add(
        *(make_request(name, prompt(3, 10 * i), n) for i, (name, n) in enumerate([("a", 1), ("b", 3), ("c", 3)]))
    )
    assert engine.step() == {"a": 3, "b": 3}
    assert engine.step() == {"b": 1, "c": 3}  # `a` is done; `c` has its row
    assert [(n.request_id, n.row) for o in engine.outputs for n in o.new_rows] == [("a", 0), ("b", 1), ("c", 0)]


def test_new_rows_carry_their_blocks_and_later_steps_only_what_is_added() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add(make_request("a", prompt(11), 4))
    for _ in range(4):
        engine.step()
    assert [new.block_ids for output in engine.outputs for new in output.new_rows] == [([0, 1, 2],)]
    added = [[list(ids) for ids in item.new_block_ids] for output in engine.outputs for item in output.scheduled]
    assert added == [[[]], [[]], [[]], [[3]]]


def test_queue_time_and_cached_tokens_are_told() -> None:
    engine = Engine()
    engine.now = 2.5
    engine.add(make_request("a", prompt(9), 1))
    engine.drain()
    engine.now = 4.0
    engine.add(make_request("b", prompt(9), 1))
    engine.drain()
    assert [(e.queue_time, e.num_cached_tokens) for e in engine.ends.values()] == [(2.5, 0), (4.0, 8)]


# --------------------------------------------------------------------------------------------------- prefix sharing


def test_requests_of_one_step_share_the_blocks_it_computes() -> None:
    engine = Engine()
    engine.add(*(make_request(name, prompt(10), 5) for name in "abc"))
    assert engine.step() == {"a": 10, "b": 2, "c": 2}
    assert (engine.total("prefix_queries"), engine.total("prefix_hits")) == (30, 16)
    tables = [engine.kv.block_ids(engine.scheduler._requests[name])[0] for name in "abc"]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    engine.drain()
    assert engine.tokens == dict.fromkeys("abc", naive(prompt(10), 5)[0])


def test_a_second_turn_hits_what_the_first_generated() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(6), 11))
    engine.drain()
    second = prompt(6) + engine.tokens["a"] + prompt(3, 50)
    engine.add(make_request("b", second, 4))
    engine.step()
    assert engine.records[-1].prefix_hits == 16  # 16 of the 17 tokens: the last one's KV was never computed
    engine.drain()
    assert engine.tokens["b"] == naive(second, 4)[0]


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    engine = Engine()
    for name in "ab":
        engine.add(make_request(name, prompt(8), 3))
        engine.drain()
    assert engine.records[3].num_tokens == 4
    assert engine.tokens["a"] == engine.tokens["b"]


def test_aborting_the_owner_leaves_its_blocks_to_those_who_share_them() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(10)), make_request("b", prompt(10)))
    engine.step()
    assert [d.finish_reason for d in engine.scheduler.abort("a")] == ["abort"]
    assert engine.kv.pool.num_used == 3
    engine.drain()
    assert engine.tokens["b"] == naive(prompt(10), 8)[0]


def test_caching_off_finds_nothing_and_asks_for_nothing() -> None:
    engine = Engine(enable_prefix_caching=False)
    engine.add(make_request("a", prompt(10)), make_request("b", prompt(10)))
    assert engine.step() == {"a": 10, "b": 10}
    assert engine.total("prefix_queries") == 0


# ------------------------------------------------------------------------------------------------------- preemption


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    engine = Engine(num_blocks=6)
    engine.add(make_request("a", prompt(8), 9), make_request("b", prompt(8, 100), 9))
    engine.step()  # two blocks each; the next tokens need a third
    for _ in range(4):
        engine.step()
    engine.add(make_request("c", prompt(2, 200), 2))
    assert engine.step() == {"a": 1}  # takes the fourth block from `b`
    assert (engine.records[-1].num_preempted, engine.records[-1].num_preempted_tokens) == (1, 12)
    assert engine.scheduler._requests["b"].status is RequestStatus.PREEMPTED
    engine.drain()
    order = [(n.request_id, n.epoch) for o in engine.outputs for n in o.new_rows]
    assert order == [("a", 0), ("b", 0), ("b", 1), ("c", 0)]
    assert engine.tokens["a"] == naive(prompt(8), 9)[0]
    assert engine.tokens["b"] == naive(prompt(8, 100), 9)[0]


def test_a_resumed_request_hits_its_own_blocks_and_counts_only_what_it_computes_again() -> None:
    engine = Engine(num_blocks=6)
    engine.add(make_request("a", prompt(8), 9), make_request("b", prompt(8, 100), 9))
    engine.drain()
    lost = engine.total("num_preempted_tokens")
    again = engine.total("num_recomputed_tokens")
    assert engine.total("num_preempted") == 1
    assert lost == 12
    assert 0 <= again < lost
    resumed = next(n for o in engine.outputs for n in o.new_rows if n.epoch == 1)
    assert resumed.num_computed_tokens == lost - again
    assert (engine.total("prefix_queries"), engine.total("prefix_hits")) == (16, 0)  # first admissions only


def test_headroom_at_admission_spares_a_preemption() -> None:
    requests = [make_request(name, prompt(8, 100 * place), 9) for place, name in enumerate("ab")]
    engine = Engine(num_blocks=6, admission_headroom=3.0)
    engine.add(*requests)
    assert engine.step() == {"a": 8}  # `b` fits, but would leave two blocks of the three that are kept for `a`
    engine.drain()
    assert engine.total("num_preempted") == 0
    assert engine.tokens == {"a": naive(prompt(8), 9)[0], "b": naive(prompt(8, 100), 9)[0]}


def preempted(engine: Engine) -> list[str]:
    return [new.request_id for output in engine.outputs for new in output.new_rows if new.epoch]


def test_whoever_costs_least_to_bring_back_is_preempted() -> None:
    engine = Engine(num_blocks=7, enable_prefix_caching=False)
    lengths = {"a": 4, "b": 5, "c": 14}
    engine.add(*(make_request(name, prompt(n, 100 * n), 4) for name, n in lengths.items()))
    engine.step()
    assert engine.step() == {"a": 1, "c": 1}  # `a` needs a block: `b` loses 5 tokens, `c`, the newest, would lose 14
    engine.drain()
    assert preempted(engine) == ["b"]
    assert engine.tokens == {name: naive(prompt(n, 100 * n), 4)[0] for name, n in lengths.items()}


def test_it_is_not_always_the_same_one() -> None:
    engine = Engine(num_blocks=7, enable_prefix_caching=False)
    requests = [make_request(name, prompt(n, 100 * n), 4) for name, n in {"a": 4, "b": 5, "c": 14}.items()]
    requests[1].num_preemptions = 2  # its 5 tokens weigh 20
    engine.add(*requests)
    engine.step()
    engine.step()
    assert requests[1].status is RequestStatus.RUNNING
    assert requests[2].status is RequestStatus.PREEMPTED
    engine.drain()


def test_a_request_that_is_itself_the_newest_preempts_itself() -> None:
    engine = Engine(num_blocks=4)
    engine.add(make_request("a", prompt(6), 8), make_request("b", prompt(7, 100), 8))
    engine.step()
    engine.step()  # `b` fills its second block
    assert engine.step() == {"a": 1}
    assert engine.records[-1].num_preempted == 1
    engine.drain()
    assert engine.tokens == {"a": naive(prompt(6), 8)[0], "b": naive(prompt(7, 100), 8)[0]}


def test_a_prefill_preempts_nobody_and_waits_until_it_fits_whole() -> None:
    engine = Engine(num_blocks=6, max_num_batched_tokens=8)
    engine.add(make_request("a", prompt(9), 4), make_request("b", prompt(16, 100), 2))
    engine.drain()
    assert engine.total("num_preempted") == 0
    assert engine.total("num_chunked") == 2
    assert [n.request_id for n in engine.outputs[0].new_rows] == ["a"]


def test_the_smallest_pool_runs_one_request_after_the_other() -> None:
    engine = Engine(num_blocks=3)
    engine.add(*(make_request(str(i), prompt(5, 50 * i), 8) for i in range(4)))  # 12 positions each: 3 blocks
    engine.drain()
    assert engine.tokens == {str(i): naive(prompt(5, 50 * i), 8)[0] for i in range(4)}
    assert engine.kv.pool.num_used == 0


# ---------------------------------------------------------------------------------------------------------- refusals


def test_what_can_never_run_is_refused_at_the_door() -> None:
    engine = Engine(num_blocks=3, max_model_len=20)
    with pytest.raises(InvalidValueError, match="empty"):
        engine.add(make_request("a", []))
    with pytest.raises(ContextLengthError, match=r"20 tokens; the context is 20"):
        engine.add(make_request("a", prompt(20)))
    with pytest.raises(ContextLengthError, match=r"need 4 KV blocks of 4, but the whole pool has 3"):
        engine.add(make_request("a", prompt(5), 9))
    engine.add(make_request("a", prompt(5), 8))
    with pytest.raises(InvalidValueError, match="already running"):
        engine.add(make_request("a", prompt(5), 8))
    engine.drain()
    assert engine.tokens["a"] == naive(prompt(5), 8)[0]


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_impossible_limits_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Engine(**{name: 0})


# ---------------------------------------------------------------------------------------------------------- stopping


def fed(engine: Engine, *tokens: int) -> RequestDelta:
    """Lets the model say `tokens` to the one running Request; its last delta."""
    for token in tokens:
        output = engine.scheduler.schedule()
        [delta] = engine.scheduler.update(output, ModelRunnerOutput(token_ids=[[token]], logprobs=[None]))
    return delta


def test_end_of_sequence_stops_without_a_stop_reason() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(3), stop_ids=frozenset({7})))
    delta = fed(engine, 5, 7)
    assert (delta.token_ids, delta.finish_reason, delta.stop_reason) == ([7], "stop", None)
    assert not engine.scheduler.has_unfinished


def test_a_stop_token_id_is_named() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(3), stop_ids=frozenset({7}), stop_token_ids=[5]))
    delta = fed(engine, 5)
    assert (delta.finish_reason, delta.stop_reason) == ("stop", 5)


def test_stop_ids_do_not_count_before_min_tokens() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(3), stop_ids=frozenset({7}), min_tokens=2))
    assert fed(engine, 7, 7).finish_reason is None
    assert fed(engine, 7).finish_reason == "stop"


@pytest.mark.parametrize(("max_tokens", "max_model_len", "expected"), [(3, 100, 3), (50, 8, 3)])
def test_max_tokens_and_the_context_end_with_length(max_tokens: int, max_model_len: int, expected: int) -> None:
    engine = Engine(max_model_len=max_model_len)
    engine.add(make_request("a", prompt(5), max_tokens))
    engine.drain()
    assert (len(engine.tokens["a"]), engine.ends["a"].finish_reason) == (expected, "length")


def test_tokens_after_the_one_that_stops_are_dropped() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(3), stop_ids=frozenset({7})))
    output = engine.scheduler.schedule()
    [delta] = engine.scheduler.update(output, ModelRunnerOutput(token_ids=[[4, 7, 9]], logprobs=[None]))
    assert (delta.token_ids, delta.finish_reason) == ([4, 7], "stop")


# ------------------------------------------------------------------------------------------- abort, finish, in flight


def test_abort_acts_at_once_wherever_the_request_is() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add(make_request("running", prompt(3)), make_request("waiting", prompt(3)))
    engine.step()
    for name in ("waiting", "running"):
        [delta] = engine.scheduler.abort(name)
        assert (delta.request_id, delta.finish_reason) == (name, "abort")
    assert engine.scheduler.abort("running") == []
    assert not engine.scheduler.has_unfinished
    assert engine.kv.pool.num_used == 0
    assert not engine.scheduler.schedule().scheduled


def test_finish_keeps_what_the_front_kept_and_drops_the_step_in_flight() -> None:
    engine = Engine()
    request = make_request("a", prompt(3))
    engine.add(request)
    for _ in range(3):
        engine.step()
    engine.launch()
    engine.scheduler.finish("a", 2)
    assert request.output_token_ids == naive(prompt(3), 8)[0][:2]
    assert engine.land() == []
    assert engine.kv.pool.num_used == 0
    engine.scheduler.finish("a", 1)  # crossed on the way: it has ended already


def test_a_result_for_an_aborted_request_is_not_given_to_its_namesake() -> None:
    engine = Engine()
    engine.add(make_request("a", prompt(3), 2))
    engine.launch()
    engine.scheduler.abort("a")
    engine.add(make_request("a", prompt(3, 40), 2))
    engine.launch()
    assert engine.land() == []
    engine.land()
    engine.drain()
    assert engine.tokens["a"] == naive(prompt(3, 40), 2)[0]


def test_a_request_waits_for_its_token_while_the_next_step_runs_others() -> None:
    engine = Engine(max_num_batched_tokens=6)
    engine.add(make_request("a", prompt(4), 2), make_request("b", prompt(7, 100), 1))
    assert {i.request_id: i.num_tokens for i in engine.launch().scheduled} == {"a": 4, "b": 2}
    assert {i.request_id: i.num_tokens for i in engine.launch().scheduled} == {"b": 5}
    assert not engine.launch().scheduled
    engine.land()
    assert {i.request_id: i.num_tokens for i in engine.launch().scheduled} == {"a": 1}
    engine.land()
    engine.land()
    assert engine.tokens == {"a": naive(prompt(4), 2)[0], "b": naive(prompt(7, 100), 1)[0]}
