from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.cli.bench.arithmetic import Outcome, is_good, printed_block, report, result_keys, summarize
from octavo.simulate.outcome import percentile

FINITE = st.floats(0, 1e6, allow_nan=False)


def outcome(ttft: float = 0.1, itls: list[float] | None = None, prompt: int = 10, tokens: int | None = None) -> Outcome:
    gaps = [0.01] * 4 if itls is None else itls
    return Outcome(
        prompt_tokens=prompt,
        success=True,
        ttft=ttft,
        itls=gaps,
        e2el=ttft + sum(gaps),
        output_tokens=len(gaps) + 1 if tokens is None else tokens,
    )


def test_tpot_leaves_the_first_token_out() -> None:
    assert outcome(ttft=0.5, itls=[0.1, 0.3]).tpot == pytest.approx(0.2)
    assert outcome(ttft=0.5, itls=[0.1, 0.3], tokens=5).tpot == pytest.approx(0.1), "tokens count, not chunks"
    assert outcome(itls=[]).tpot is None


def test_itls_are_pooled_and_the_others_are_one_value_a_request() -> None:
    run = report([outcome(itls=[0.001] * 9), outcome(itls=[0.101])], duration=2.0)
    assert run.summaries["itl"].mean == pytest.approx((9 * 1 + 101) / 10), "ten gaps in all, in milliseconds"
    assert run.summaries["tpot"].mean == pytest.approx((1 + 101) / 2), "two requests"


def test_throughput_counts_what_succeeded() -> None:
    failed = Outcome(prompt_tokens=1000, error="refused")
    run = report([outcome(prompt=10), outcome(prompt=30), failed], duration=4.0)
    assert (run.completed, run.failed) == (2, 1)
    assert run.request_throughput == 0.5
    assert run.output_throughput == 10 / 4
    assert run.total_token_throughput == (40 + 10) / 4


def test_goodput_needs_every_objective() -> None:
    quick, slow = outcome(ttft=0.1), outcome(ttft=0.3)
    run = report([quick, slow], duration=2.0, goodput={"ttft": 200, "tpot": 50})
    assert run.request_goodput == 0.5
    assert report([quick], duration=1.0).request_goodput is None, "no objectives, no goodput"
    assert not is_good(quick, {"tpot": 5}), "10 ms a token"
    assert is_good(outcome(itls=[]), {"tpot": 5}), "one token has no time per further token"


@given(st.lists(FINITE, min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_is_that_of_numpy(values: list[float], rank: float) -> None:
    assert percentile(values, rank) == pytest.approx(float(np.percentile(values, rank)), rel=1e-9, abs=1e-9)


@given(st.lists(FINITE, min_size=1, max_size=40))
def test_summary_is_that_of_numpy(values: list[float]) -> None:
    summary = summarize(values, [50])
    assert summary.mean == pytest.approx(float(np.mean(values)), rel=1e-9, abs=1e-9)
    assert summary.std == pytest.approx(float(np.std(values)), rel=1e-6, abs=1e-6)
    assert summary.percentiles == ((50, summary.median),)


def test_nothing_succeeded_is_zeros_not_a_crash() -> None:
    run = report([Outcome(prompt_tokens=1)], duration=1.0)
    assert run.summaries["ttft"].mean == 0.0
    assert "Successful requests:                     0" in printed_block(
        run, ["ttft"], max_concurrency=None, request_rate=math.inf
    )


def test_the_block_is_vllms_line_for_line() -> None:
    run = report([outcome(ttft=0.25, itls=[0.05, 0.15])], duration=2.0, percentiles=[50, 99], goodput={"ttft": 300})
    block = printed_block(run, ["ttft", "itl"], max_concurrency=8, request_rate=2.5).splitlines()
    assert block[0] == "============ Serving Benchmark Result ============"
    assert "Maximum request concurrency:             8         " in block
    assert "Request rate configured (RPS):           2.50      " in block
    assert "Benchmark duration (s):                  2.00      " in block
    assert "Request goodput (req/s):                 0.50      " in block
    assert "---------------Time to First Token----------------" in block
    assert "P99 TTFT (ms):                           250.00    " in block
    assert "Mean ITL (ms):                           100.00    " in block
    assert not [line for line in block if "TPOT" in line], "only the metrics asked for"
    assert block[-1] == "=" * 50


def test_saved_keys_are_vllms() -> None:
    keys = result_keys(report([outcome()], duration=1.0))
    expected = {"duration", "completed", "total_input_tokens", "total_output_tokens", "request_throughput"}
    expected |= {"request_goodput", "output_throughput", "total_token_throughput"}
    for name in ("ttft", "tpot", "itl", "e2el"):
        expected |= {f"mean_{name}_ms", f"median_{name}_ms", f"std_{name}_ms", f"p99_{name}_ms"}
    assert expected <= set(keys)
