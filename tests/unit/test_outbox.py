"""A slow consumer gets larger outputs, never fewer tokens."""

import asyncio

from octavo.engine.outbox import Outbox
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.sampling_params import RequestOutputKind


def output(tokens, text, index=0, finished=False):
    reason = "stop" if finished else None
    return RequestOutput("r", None, [1], [CompletionOutput(index, text, tokens, finish_reason=reason)], finished)


def take(box):
    return asyncio.run(box.take())


def test_deltas_add_up_per_index():
    box = Outbox(RequestOutputKind.DELTA)
    box.put(output([1], "a"))
    box.put(output([2], "b", index=1))
    box.put(output([3, 4], "cd", finished=True))
    merged = take(box)
    assert [(o.index, o.token_ids, o.text) for o in merged.outputs] == [(0, [1, 3, 4], "acd"), (1, [2], "b")]
    assert merged.finished
    assert merged.outputs[0].finish_reason == "stop"


def test_cumulative_outputs_replace():
    box = Outbox(RequestOutputKind.CUMULATIVE)
    box.put(output([1], "a"))
    box.put(output([1, 2], "ab"))
    assert take(box).outputs[0].token_ids == [1, 2]


def test_a_relay_is_asked_while_the_consumer_waits_and_at_no_other_time():
    relayed, answer = [], True

    def relay(item):
        relayed.append(item.text)
        if answer is None:
            raise ValueError("x")
        return answer

    async def go():
        nonlocal answer
        box = Outbox(RequestOutputKind.DELTA, relay)

        def put(item):
            if not box.relay(item.outputs[0]):
                box.put(item)

        put(output([1], "a"))
        assert (await box.take()).outputs[0].text == "a"
        waiting = asyncio.create_task(box.take())
        await asyncio.sleep(0)
        put(output([2], "b"))
        answer = False
        put(output([3], "c"))  # not taken: it waits, and what comes behind it must not pass it
        put(output([4], "d"))
        assert (await waiting).outputs[0].text == "cd"
        put(output([5], "e"))
        assert (await box.take()).outputs[0].text == "e"
        waiting, answer = asyncio.create_task(box.take()), None
        await asyncio.sleep(0)
        put(output([6], "f"))
        assert isinstance(await waiting, ValueError)

    asyncio.run(go())
    assert relayed == ["b", "c", "f"]


def test_an_error_is_not_lost_behind_an_output():
    box = Outbox(RequestOutputKind.DELTA)
    box.put(output([1], "a"))
    box.put(ValueError("x"))
    assert isinstance(take(box), ValueError)
