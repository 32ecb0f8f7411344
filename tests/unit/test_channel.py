"""The channel: frames survive any cut, a slow front gets merged deltas, nonsense is refused."""

import asyncio
import os
import socket

import pytest

from octavo.engine.channel import MAX_FRAME, EngineChannel, decode, encode, merge_delta
from octavo.engine.front_channel import FrontChannel
from octavo.errors import EngineDeadError
from octavo.messages import AbortRequests, AddRequest, EngineReady, RequestDelta, StepOutputs, StepRecord
from octavo.sampling_params import SamplingParams
from octavo.step import TokenLogprobs


def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    told, telling = os.pipe()
    return ours, os.fdopen(told, "rb", 0), EngineChannel(theirs, telling)


def add_request(name="r"):
    params = SamplingParams(stop=["a", "b"], logit_bias={5: -1.5}, seed=3, temperature=0.5)
    return AddRequest(name, [1, 2, 3], params, max_tokens=9, seed=3)


def test_messages_survive_any_cut():
    front, pipe, channel = pair()
    messages = [add_request("a"), AbortRequests(["a", "b"]), add_request("c")]
    data = b"".join(encode(m) for m in messages)
    got = []
    for i in range(0, len(data), 7):
        front.sendall(data[i : i + 7])
        got += channel.receive(wait=False)
    assert got == messages
    front.close()
    pipe.close()
    assert channel.receive(wait=True) == []
    assert channel.closed
    channel.close()


def test_what_a_model_recommends_keeps_its_types():
    given = {"top_k": 20, "temperature": 1.0}
    frame = encode(EngineReady(1, 16, 64, 99, given, 0, 0, "native", "int8", "bfloat16", {}, ""))
    told = decode(frame[4], frame[5:]).generation_defaults
    assert {name: type(value) for name, value in told.items()} == {"top_k": int, "temperature": float}
    assert SamplingParams(**told).top_k == 20


def test_a_slow_front_gets_merged_deltas_and_loses_nothing():
    front, pipe, channel = pair()
    steps = 4000
    logprobs = [TokenLogprobs(-0.5, 1, [1], [-0.5])]
    for step in range(steps):
        deltas = [RequestDelta(f"r{i}", [step], logprobs) for i in range(8)]
        if step == steps - 1:
            deltas[0].finish_reason = "length"
        channel.publish(StepOutputs(deltas, [StepRecord(step, 0.0)]))
    assert channel._held is not None, "the pipe should have been full"
    assert len(channel._held.deltas) == 8, "what waits is one delta per request, however many steps went by"

    async def flush_on():
        while True:
            channel._flush()
            await asyncio.sleep(0)

    async def read():
        reader = await FrontChannel.open(front, pipe)
        tokens = {f"r{i}": [] for i in range(8)}
        reason = None
        flusher = asyncio.create_task(flush_on())
        while reason is None:
            outputs = await reader.receive()
            for delta in outputs.deltas:
                tokens[delta.request_id] += delta.token_ids
                assert len(delta.logprobs) == len(delta.token_ids)
                reason = reason or delta.finish_reason
        flusher.cancel()
        await reader.close()
        return tokens

    tokens = asyncio.run(read())
    channel.close()
    assert all(ids == list(range(steps)) for ids in tokens.values())


def test_nonsense_is_refused():
    with pytest.raises(EngineDeadError, match="unknown message kind"):
        decode(99, b"")
    with pytest.raises(EngineDeadError, match="malformed AddRequest"):
        decode(encode(add_request())[4], b"\xc1")
    front, pipe, channel = pair()
    front.sendall((MAX_FRAME + 1).to_bytes(4, "little") + b"\x01")
    with pytest.raises(EngineDeadError, match="over"):
        channel.receive(wait=False)
    front.close()
    pipe.close()
    channel.close()


def test_front_learns_that_the_engine_is_gone():
    front, pipe, channel = pair()
    channel.close()

    async def read():
        reader = await FrontChannel.open(front, pipe)
        message = await reader.receive()
        await reader.close()
        return message

    assert asyncio.run(read()) is None


def test_merging_loses_no_field():
    """What a request was told in two steps is what it is told in one; a field that is added must be merged, too."""
    said = {
        "token_ids": [2],
        "logprobs": [TokenLogprobs(-0.5, 1, [1], [-0.5])],
        "vector": b"1234",
        "prompt_logprobs": [TokenLogprobs(-0.5, 1, [1], [-0.5])],
        "finish_reason": "error",
        "stop_reason": 7,
        "cumulative_logprob": -1.5,
        "num_cached_tokens": 16,
        "queue_time": 0.25,
        "error": "the queue is full",
        "error_kind": "QueueFullError",
        "retry_after": 3.0,
        "alone": True,
    }
    assert {"request_id", *said} == set(RequestDelta.__struct_fields__)
    merged = RequestDelta("r", [1])
    merge_delta(merged, RequestDelta("r", **said))
    assert merged == RequestDelta("r", **{**said, "token_ids": [1, 2]})
    first = RequestDelta("r", [1], num_cached_tokens=16, queue_time=0.25)
    merge_delta(first, RequestDelta("r", [2]))
    assert first == RequestDelta("r", [1, 2], num_cached_tokens=16, queue_time=0.25), "they are told once"


def test_what_a_dying_engine_said_is_read_though_it_could_not_be_written_to():
    """Who runs alone is told before it may kill the engine, while the front still sends it others."""
    front, pipe, channel = pair()

    async def use():
        reader = await FrontChannel.open(front, pipe)
        channel.publish(StepOutputs([RequestDelta("guilty", [], alone=True)], [StepRecord(1, 0.0)]))
        channel.close()
        reader.send(AbortRequests(["x"]))  # fails, before the loop has read anything
        assert reader._socket.is_closing()
        told = await reader.receive()
        assert [(d.request_id, d.alone) for d in told.deltas] == [("guilty", True)]
        assert await reader.receive() is None

    asyncio.run(use())
