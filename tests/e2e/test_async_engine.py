"""AsyncEngine as a library: a real engine process on a tiny model with seeded weights, token ids in and out."""

import asyncio
import json

import pytest
from tiny_engine import with_engine

from octavo import RequestOutputKind, SamplingParams
from octavo.errors import ConfigError, ContextLengthError, InvalidValueError, MemoryPlanError, TimeLimitError
from octavo.sampling_params import StructuredOutputsParams
from tests.tiny_llama import TINY

PROMPT = [5, 6, 7]


def params(**changes):
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 40, "ignore_eos": True, **changes})


async def collect(engine, request_id, **changes):
    return [output async for output in engine.generate(PROMPT, params(**changes), request_id)]


def test_kinds_of_output_agree(folder):
    async def use(engine):
        return [await collect(engine, kind.value, output_kind=kind, n=2, max_tokens=200) for kind in RequestOutputKind]

    cumulative, deltas, final = with_engine(folder, use)
    assert len(final) == 1
    whole = {o.index: o.token_ids for o in final[0].outputs}
    assert {o.index: o.token_ids for o in cumulative[-1].outputs} == whole
    added = {0: [], 1: []}
    for output in deltas:
        for answer in output.outputs:
            added[answer.index] += answer.token_ids
    assert added == whole
    assert all(len(ids) == 200 for ids in whole.values())


def test_a_slow_consumer_gets_everything_in_fewer_pieces(folder):
    async def use(engine):
        quick = await collect(engine, "quick", output_kind=RequestOutputKind.DELTA)
        tokens, pieces, heard = [], 0, []
        slow = params(output_kind=RequestOutputKind.DELTA)
        async for output in engine.generate(PROMPT, slow, "slow", on_tokens=heard.append):
            tokens += output.outputs[0].token_ids
            pieces += 1
            while sum(heard) < 40:  # it comes back when all is there
                await asyncio.sleep(0.001)
        return [t for o in quick for t in o.outputs[0].token_ids], tokens, pieces

    quick, slow, pieces = with_engine(folder, use)
    assert slow == quick
    assert pieces <= 2


def test_leaving_the_stream_frees_the_whole_pool(folder):
    async def use(engine):
        for i in range(8):
            async for _ in engine.generate(PROMPT, params(max_tokens=200), f"left-{i}"):
                break
        whole = params(max_tokens=2)
        return [o async for o in engine.generate([9] * 254, whole, "whole")], engine._frontend.num_unfinished

    outputs, unfinished = with_engine(folder, use, num_gpu_blocks_override=16)
    assert len(outputs[-1].outputs[0].token_ids) == 2
    assert unfinished == 0


@pytest.fixture
def long_folder(tmp_path):
    """A model whose answers may take seconds: whoever leaves in the middle is in the middle."""
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "max_position_embeddings": 32768}))
    return tmp_path


def test_abort_ends_a_stream_with_its_reason(long_folder):
    async def use(engine):
        last = None
        async for output in engine.generate(PROMPT, params(max_tokens=30_000, n=2), "r"):
            if last is None:
                await engine.abort("r")
            last = output
        return last

    last = with_engine(long_folder, use)
    assert last.finished
    assert [o.finish_reason for o in last.outputs] == ["abort", "abort"]


def test_wrong_requests_are_refused_before_the_first_output(folder):
    async def use(engine):
        with pytest.raises(InvalidValueError, match="without a tokenizer"):
            await anext(engine.generate("text", params(), "a"))
        with pytest.raises(ContextLengthError):
            await anext(engine.generate([1] * 256, params(), "b"))
        engine._grammars.compile = lambda asked: asyncio.sleep(60)  # others' are built before it
        waits = params(structured_outputs=StructuredOutputsParams(regex="a"), ignore_eos=False)
        with pytest.raises(TimeLimitError, match=r"0\.01 s has passed"):
            await anext(engine.generate(PROMPT, waits, "c", timeout=0.01))
        with pytest.raises(InvalidValueError, match="from 0 to 96"):
            await anext(engine.generate([97], params(), "c"))
        return await collect(engine, "d")

    assert len(with_engine(folder, use)[-1].outputs[0].token_ids) == 40


def test_what_the_engine_cannot_start_with_is_raised_here(folder):
    async def use(engine):
        raise AssertionError("it should not have started")

    with pytest.raises(MemoryPlanError, match="largest --max-model-len that fits is 32"):
        with_engine(folder, use, max_model_len=256, num_gpu_blocks_override=2)
    with pytest.raises(ConfigError, match="max_model_len"):
        with_engine(folder, use, max_model_len=4096)


def test_start_up_phases_add_up_and_metrics_move(folder):
    async def use(engine):
        await collect(engine, "m")
        return engine.timings, engine.metrics.render().decode()

    timings, page = with_engine(folder, use)
    assert {"weights", "kv cache", "warm-up"} <= set(timings)
    assert all(seconds >= 0 for seconds in timings.values())
    assert 'octavo:generation_tokens_total{engine="0"' in page
    line = next(x for x in page.splitlines() if x.startswith("octavo:generation_tokens_total"))
    assert float(line.split()[-1]) == 40


def test_who_leaves_has_paid_for_what_was_generated(long_folder):
    """Only the end of an answer is told: who leaves before has seen none of its tokens, and is told their number."""

    async def use(engine):
        heard = []
        final = params(max_tokens=30_000, output_kind=RequestOutputKind.FINAL_ONLY)
        leaving = asyncio.create_task(anext(engine.generate(PROMPT, final, "left", on_tokens=heard.append)))
        while sum(heard) < 20:
            await asyncio.sleep(0.001)
        leaving.cancel()
        await asyncio.wait([leaving])
        return leaving.cancelled(), sum(heard)

    left, num_tokens = with_engine(long_folder, use)
    assert left
    assert 20 <= num_tokens < 30_000
