"""Each policy's promise, on the fake executor: order, ageing, the bound of unfairness, targets, and the door."""

from __future__ import annotations

import random

import pytest
from fake import make_request, naive
from test_scheduler import Engine, prompt

from octavo.errors import QueueFullError
from octavo.scheduler.cost import CostModel, StepWork, fit
from octavo.scheduler.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairPolicy
from octavo.scheduler.policies import PriorityPolicy
from octavo.scheduler.slo import LATE_SHARE, MIN_CHUNK, SloPolicy


def admitted(engine: Engine) -> list[str]:
    """Ids in the order of admission."""
    return [new.request_id for output in engine.outputs for new in output.new_rows]


# --------------------------------------------------------------------------------------------------------- priority


def test_among_the_least_urgent_the_cheapest_is_preempted() -> None:
    engine = Engine(num_blocks=9, policy=PriorityPolicy(), enable_prefix_caching=False)
    for name, length, priority in (("a", 4, 0), ("urgent", 5, 0), ("low", 6, 5), ("lower", 14, 5)):
        engine.add(make_request(name, prompt(length, 100 * length), 4, priority=priority))
    engine.step()
    engine.step()
    assert [victim.request_id for victim, _ in engine.scheduler.preempted] == ["low"]
    engine.drain()


def test_the_lowest_priority_value_is_admitted_first_and_ties_keep_their_order() -> None:
    engine = Engine(max_num_seqs=1, policy=PriorityPolicy())
    for name, priority in (("a", 1), ("b", 0), ("c", -1), ("d", 0)):
        engine.add(make_request(name, prompt(3), 2, priority=priority))
    engine.drain()
    assert admitted(engine) == ["c", "b", "d", "a"]


def test_nothing_starves_behind_an_endless_stream_of_more_urgent_requests() -> None:
    engine = Engine(max_num_seqs=1, policy=PriorityPolicy(ageing_seconds=2.0))
    engine.add(make_request("patient", prompt(3), 2, priority=5))
    for number in range(40):
        engine.now = float(number)
        engine.add(make_request(f"urgent-{number}", prompt(3), 2, priority=0, arrival=engine.now))
        engine.step()
        engine.step()
    order = admitted(engine)
    # overtaken by those that came within (5 - 0) * 2 s after it, and by nobody else
    assert order.index("patient") == 10


def test_under_pressure_the_least_urgent_is_preempted() -> None:
    engine = Engine(num_blocks=7, policy=PriorityPolicy())
    engine.add(make_request("first", prompt(8), 6, priority=3))
    engine.step()
    engine.add(make_request("low", prompt(7, 500), 6, priority=5), make_request("high", prompt(7, 900), 6))
    engine.drain()
    preempted = {new.request_id for output in engine.outputs for new in output.new_rows if new.epoch}
    assert engine.total("num_preempted") > 0
    assert "high" not in preempted
    assert "first" not in preempted
    for name, first in (("low", 500), ("high", 900)):
        assert engine.tokens[name] == naive(prompt(7, first), 6)[0]


def test_the_least_urgent_is_preempted_where_each_request_needs_a_block_of_several_groups() -> None:
    engine = Engine(num_blocks=17, windows=(0, 0), policy=PriorityPolicy(), enable_prefix_caching=False)
    for name, length, priority in (("first", 8, 1), ("low", 7, 5), ("high", 8, 0)):
        engine.add(make_request(name, prompt(length, 100 * priority), 6, priority=priority))
        engine.step()
    assert engine.kv.pool.num_available == 3  # a block for each, but "low" and "high" now need one in both groups
    engine.step()
    assert [victim.request_id for victim, _ in engine.scheduler.preempted] == ["low"]
    engine.drain()


# ------------------------------------------------------------------------------------------------------------- fair


@pytest.mark.parametrize("seed", range(20))
def test_the_counters_of_waiting_tenants_stay_within_the_stated_bound(seed: int) -> None:
    draw = random.Random(seed)
    policy = FairPolicy()
    rows, longest, most_new = draw.randint(1, 4), 12, 9
    engine = Engine(num_blocks=12, max_num_seqs=rows, policy=policy)
    weights = dict(zip("abc", draw.choice([(1.0, 1.0, 1.0), (2.0, 0.5, 1.0)]), strict=True))
    bound = rows * (PROMPT_WEIGHT * longest + OUTPUT_WEIGHT * most_new) / min(weights.values())
    widest = 0.0
    for number in range(300):
        for tenant in "abc":
            if draw.random() < {"a": 0.5, "b": 0.3, "c": 0.05}[tenant]:
                ids = [draw.randrange(50) for _ in range(draw.randint(1, longest))]
                new = draw.randint(1, most_new)
                engine.add(make_request(f"{tenant}{number}", ids, new, tenant=tenant, weight=weights[tenant]))
        if engine.scheduler.has_unfinished:
            engine.step()
        counters = [policy._counters[tenant] for tenant in policy._queues]
        widest = max(widest, max(counters, default=0.0) - min(counters, default=0.0))
    assert 0 < widest <= bound


def service_at_the_end(policy: FairPolicy | None, tenants: dict[str, int], steps: int = 200) -> dict[str, int]:
    """Tokens generated by tenant, when each has `tenants[name]` requests waiting from the start."""
    engine = Engine(num_blocks=64, max_num_seqs=4, policy=policy)
    for tenant, count in tenants.items():
        for number in range(count):
            ids = [number, ord(tenant[0]), *prompt(3)]
            engine.add(
                make_request(f"{tenant}-{number}", ids, 4, tenant=tenant, weight=3.0 if tenant == "gold" else 1.0)
            )
    for _ in range(steps):
        engine.step()
    served = dict.fromkeys(tenants, 0)
    for name, tokens in engine.tokens.items():
        served[name.split("-")[0]] += len(tokens)
    return served


def test_a_flood_of_one_tenant_does_not_delay_another() -> None:
    fair = service_at_the_end(FairPolicy(), {"flood": 300, "small": 100}, steps=100)
    assert abs(fair["flood"] - fair["small"]) <= 4 * (5 + 2 * 4) / 2
    fcfs = service_at_the_end(None, {"flood": 300, "small": 100}, steps=100)
    assert fcfs["small"] == 0


def test_weights_share_in_proportion() -> None:
    served = service_at_the_end(FairPolicy(), {"gold": 400, "tin": 400})
    assert served["gold"] / served["tin"] == pytest.approx(3.0, rel=0.1)


def test_what_an_idle_tenant_did_not_use_is_not_saved_up() -> None:
    policy = FairPolicy()
    engine = Engine(max_num_seqs=1, policy=policy)
    for number in range(40):
        engine.add(make_request(f"a{number}", [number, 1, 2], 3, tenant="a"))
    for _ in range(60):
        engine.step()
    begun = len(admitted(engine))
    for number in range(10):
        engine.add(make_request(f"b{number}", [90 + number, 1, 2], 3, tenant="b"))
    engine.drain()
    owners = [name[0] for name in admitted(engine)[begun:]]
    assert sorted(owners[:10]) == ["a"] * 5 + ["b"] * 5


# -------------------------------------------------------------------------------------------------------------- slo

COST = CostModel(fixed=1.0, per_token=0.1)


def test_chunks_are_cut_so_that_running_requests_keep_their_target() -> None:
    engine = Engine(num_blocks=64, policy=SloPolicy(ttft=1000.0, itl=3.0, cost=COST))
    engine.add(make_request("a", prompt(40), 6))
    assert engine.step() == {"a": 40}  # nobody waits for a token: no cap
    engine.add(make_request("b", prompt(50, 100), 2))
    assert engine.step() == {"a": 1, "b": 19}  # 1.0 + 0.1 * 20 = 3.0
    engine.scheduler.policy.cost = CostModel(fixed=5.0)  # type: ignore[attr-defined]
    assert engine.step() == {"a": 1, "b": 31}  # a fixed cost above the target: tokens are free beside it
    engine.drain()


def test_prompts_that_get_a_single_token_count_against_the_cap() -> None:
    policy = SloPolicy(ttft=1000.0, itl=3.0, cost=COST)
    engine = Engine(num_blocks=64, policy=policy)
    engine.add(make_request("a", prompt(4), 6))
    engine.step()
    for name in "bcd":
        engine.add(make_request(name, prompt(18, 100 * ord(name)), 2))
    assert engine.step() == {"a": 1, "b": 18, "c": 1}  # 19 prompt tokens fit
    engine.drain()


def test_an_impossible_target_still_lets_prompts_advance() -> None:
    engine = Engine(num_blocks=64, policy=SloPolicy(ttft=1000.0, itl=0.5, cost=COST))
    engine.add(make_request("a", prompt(40), 6))
    engine.step()
    engine.add(make_request("b", prompt(50, 100), 2))
    assert engine.step() == {"a": 1, "b": MIN_CHUNK}


def test_the_shortest_goes_first_until_it_has_waited_long_enough() -> None:
    engine = Engine(max_num_seqs=1, num_blocks=64, policy=SloPolicy(ttft=1e6, itl=9.0, cost=COST))
    engine.add(make_request("long", prompt(40), 2, arrival=0.0))
    engine.add(make_request("short", prompt(4, 100), 2, arrival=1.0))
    engine.add(make_request("late and short", prompt(4, 200), 2, arrival=100.0))
    engine.drain()
    assert admitted(engine) == ["short", "long", "late and short"]


def test_who_cannot_make_its_deadline_steps_aside_but_does_not_starve() -> None:
    engine = Engine(max_num_seqs=1, policy=SloPolicy(ttft=5.0, itl=9.0, cost=COST))
    engine.now = 10.0
    engine.add(make_request("missed", prompt(3), 1, arrival=0.0))
    for number in range(2 * LATE_SHARE):
        engine.add(make_request(f"in time {number}", prompt(3, 100), 1, arrival=10.0))
    for _ in range(2 * LATE_SHARE):
        engine.step()
    assert admitted(engine).index("missed") == LATE_SHARE - 1


def test_who_ends_while_it_waits_was_not_admitted_before_the_late() -> None:
    engine = Engine(max_num_seqs=1, policy=SloPolicy(ttft=5.0, itl=9.0, cost=COST))
    engine.now = 10.0
    engine.add(make_request("missed", prompt(3), 1, arrival=0.0))
    for number in range(2 * LATE_SHARE):
        engine.add(make_request(f"in time {number}", prompt(3, 100), 1, arrival=10.0))
    for number in range(LATE_SHARE - 1):
        engine.scheduler.abort(f"in time {number}")
    for _ in range(LATE_SHARE):
        engine.step()
    assert admitted(engine).index("missed") == LATE_SHARE - 1


# ------------------------------------------------------------------------------------------------------------- cost


def test_the_fit_finds_known_costs_and_none_is_negative() -> None:
    draw = random.Random(1)
    known = CostModel(fixed=0.002, per_token=1e-4, per_row=5e-4, per_position=1e-6, per_pair=2e-8)
    works = [
        StepWork(draw.randint(1, 512), draw.randint(0, 64), draw.randint(1, 50_000), draw.randint(0, 100_000))
        for _ in range(200)
    ]
    found = fit([(work, known.seconds(work)) for work in works])
    for work in works:
        assert found.seconds(work) == pytest.approx(known.seconds(work), rel=1e-3)
    falling = fit([(StepWork(n, 0, 0, 0), 1.0 / n) for n in range(1, 20)])
    assert falling.per_token == 0.0
    assert falling.fixed > 0.0


def test_the_fit_is_right_on_average_where_steps_are_held_up() -> None:
    draw = random.Random(2)
    known = CostModel(fixed=0.005, per_token=6e-4, per_row=2e-4)
    works = [StepWork(draw.randint(1, 512), draw.randint(0, 64), 0, 0) for _ in range(2000)]
    found = fit([(work, known.seconds(work) * draw.choice([0.9, 0.9, 0.9, 1.3])) for work in works])
    ratios = [found.seconds(work) / known.seconds(work) for work in works]
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.01)  # to errors relative to what was measured: 0.955


# ------------------------------------------------------------------------------------------------------------- door


def test_a_full_queue_refuses_with_the_predicted_wait() -> None:
    engine = Engine(max_num_seqs=1, max_num_queued_reqs=3)
    for number in range(3):
        engine.add(make_request(f"r{number}", prompt(3), 2))
    with pytest.raises(QueueFullError, match=r"3 requests with 9 prompt tokens wait, the limit is 3 requests") as full:
        engine.add(make_request("one too many", prompt(3), 2))
    assert full.value.retry_after == 1.0  # nothing is known yet
    for _ in range(3):
        engine.now += 10.0
        engine.step()
    engine.add(make_request("r3", prompt(3), 2), make_request("r4", prompt(3), 2))
    with pytest.raises(QueueFullError) as full:
        engine.add(make_request("r5", prompt(3), 2))
    assert full.value.retry_after == pytest.approx(3 * 10.0)  # 2 admissions in 20 s, three before it
    engine.drain()
    assert len(engine.ends) == 5


def test_a_queue_bounded_in_tokens_lets_one_long_prompt_in_alone() -> None:
    engine = Engine(max_num_queued_tokens=10)
    engine.add(make_request("long", prompt(40), 2))
    with pytest.raises(QueueFullError, match=r"10 prompt tokens \(max_num_queued_tokens\)"):
        engine.add(make_request("short", prompt(3), 2))
    engine.step()
    engine.add(make_request("short", prompt(3), 2))
    engine.drain()


def test_a_passed_deadline_ends_a_request_wherever_it_is() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add(make_request("running", prompt(3), 50, timeout=2.0), make_request("waiting", prompt(3), timeout=1.0))
    engine.add(make_request("quick", prompt(3), 2, timeout=9.0))
    engine.step()
    engine.now = 1.5
    assert [(d.request_id, d.error_kind) for d in engine.scheduler.expire()] == [("waiting", "TimeLimitError")]
    engine.now = 2.0
    [delta] = engine.scheduler.expire()
    assert (delta.request_id, delta.finish_reason) == ("running", "error")
    assert "timeout of 2 s" in (delta.error or "")
    engine.drain()
    assert engine.tokens["quick"] == naive(prompt(3), 2)[0]
    engine.now = 99.0
    assert engine.scheduler.expire() == []


@pytest.mark.parametrize("name", ["priority", "slo"])
def test_who_left_before_its_turn_and_its_deadline_is_not_remembered(name: str) -> None:
    """Clients that give up by the thousand, with timeouts of a day and behind somebody who waits."""
    policy = PriorityPolicy() if name == "priority" else SloPolicy(1e6, 0.1, CostModel())
    engine = Engine(max_num_seqs=1, policy=policy)
    engine.add(make_request("runs", prompt(3), 50, priority=-9))
    engine.step()
    engine.add(make_request("waits", prompt(3), 2, timeout=9.0))
    for number in range(1000):
        engine.add(make_request(f"r{number}", prompt(3), priority=1 << 30, arrival=1.0, timeout=86_400.0))
        engine.scheduler.abort(f"r{number}")
    heap = policy._heap if isinstance(policy, PriorityPolicy) else policy._hopeful
    assert max(len(engine.scheduler.door.deadlines), len(heap._heap)) <= 100
    assert policy.first(engine.now) is engine.scheduler.find("waits")
    engine.now = 9.0
    assert [delta.request_id for delta in engine.scheduler.expire()] == ["waits"]
