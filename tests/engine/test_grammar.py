"""Grammars of strangers are built in a process that can be killed, within limits, and refused by name."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from octavo.engine import grammar
from octavo.engine.grammar import GrammarCompiler, compile_here
from octavo.errors import InvalidValueError, QueueFullError
from octavo.sampling_params import MAX_GRAMMAR, MAX_NESTING, SamplingParams, StructuredOutputsParams

pytest.importorskip("llguidance")


def with_compiler(use):
    async def body():
        compiler = GrammarCompiler()
        try:
            return await use(compiler)
        finally:
            await compiler.close()

    return asyncio.run(asyncio.wait_for(body(), 60))


def test_both_ways_give_the_same_and_the_process_is_kept() -> None:
    asked = [
        StructuredOutputsParams(json={"type": "object", "properties": {"a": {"type": "number"}}}),
        StructuredOutputsParams(json='{"type": "array"}'),
        StructuredOutputsParams(json_object=True),
        StructuredOutputsParams(regex="[a-z]{2}"),
        StructuredOutputsParams(choice=["a", 'b"', "\n"]),
        StructuredOutputsParams(grammar='start: "a" | "b"'),
        StructuredOutputsParams(grammar='root ::= "a" root | "b"'),
    ]

    async def use(compiler):
        built = [await compiler.compile(one) for one in asked]
        pid = compiler._sandbox._process.pid
        assert [await compiler.compile(one) for one in asked] == built
        assert compiler._sandbox._process.pid == pid
        return built

    assert with_compiler(use) == [compile_here(one) for one in asked]


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"regex": "(a"}, "regex"),
        ({"grammar": "start: nothing_here"}, "grammar"),
        ({"json": {"type": "sometimes"}}, "json"),
        ({"json": "{"}, "json"),
        ({"json": {"$ref": "http://example.org/schema"}}, "json"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "json"),
    ],
)
def test_what_cannot_be_built_is_refused_and_the_next_one_is_built(spec: dict, word: str) -> None:
    async def use(compiler):
        with pytest.raises(InvalidValueError, match=f"^{word}: no grammar can be built") as caught:
            await compiler.compile(StructuredOutputsParams(**spec, asked_as="response_format"))
        assert caught.value.param == "response_format"
        assert await compiler.compile(StructuredOutputsParams(regex="a"))

    with_compiler(use)


def test_what_takes_too_long_is_killed() -> None:
    async def use(compiler):
        assert await compiler.compile(StructuredOutputsParams(regex="a"))
        compiler._sandbox._process.send_signal(19)  # SIGSTOP: it will never answer
        compiler._sandbox._seconds = 0.3
        began = time.monotonic()
        with pytest.raises(InvalidValueError, match=r"longer than 0\.3 s"):
            await compiler.compile(StructuredOutputsParams(regex="b"))
        assert time.monotonic() - began < 20
        compiler._sandbox._seconds = 20
        assert await compiler.compile(StructuredOutputsParams(regex="b"))
        compiler._sandbox._process.kill()
        with pytest.raises(InvalidValueError, match="too large"):
            await compiler.compile(StructuredOutputsParams(regex="c"))
        assert await compiler.compile(StructuredOutputsParams(regex="c"))

    with_compiler(use)


def test_who_leaves_takes_the_answer_along() -> None:
    """The client is gone when its grammar is built; the next one, another tenant's, gets its own all the same."""

    async def use(compiler):
        assert await compiler.compile(StructuredOutputsParams(regex="a"))
        process = compiler._sandbox._process
        for number in range(3):
            asked = StructuredOutputsParams(regex=f"gone{number}")
            leaving = asyncio.create_task(compiler.compile(asked))
            await asyncio.sleep(0)
            while compiler._sandbox._process is None:  # until it is written
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            assert compiler._sandbox._process is None, "whoever may still answer is not read again"
            wanted = StructuredOutputsParams(choice=[f"b{number}"])
            assert await compiler.compile(wanted) == compile_here(wanted)
            assert await compiler.compile(asked) == compile_here(asked)
        assert await process.wait() == -9

    with_compiler(use)


def test_what_was_refused_once_is_refused_at_once() -> None:
    async def use(compiler):
        for name in ("response_format", "structured_outputs"):
            with pytest.raises(InvalidValueError, match="no grammar can be built") as caught:
                await compiler.compile(StructuredOutputsParams(regex="(a", asked_as=name))
            assert caught.value.param == name
        assert compiler._sandbox._num_asked == 1

    with_compiler(use)


def test_only_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process does not answer; one question is under way, two wait behind it, the others come back later."""
    monkeypatch.setattr(grammar, "MAX_WAITING", 3)

    async def use(compiler):
        assert await compiler.compile(StructuredOutputsParams(regex="a"))
        process = compiler._sandbox._process
        process.send_signal(signal.SIGSTOP)
        asked = [StructuredOutputsParams(regex=f"b{number}") for number in range(6)]
        tasks = [asyncio.create_task(compiler.compile(one)) for one in asked]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        refused = [task.exception() for task in tasks if task.done()]
        assert len(refused) == 3
        assert all(isinstance(error, QueueFullError) and error.retry_after > 0 for error in refused)
        process.send_signal(signal.SIGCONT)
        built = await asyncio.gather(*tasks[:3])
        assert built == [compile_here(one) for one in asked[:3]]

    with_compiler(use)


def test_an_answer_to_another_question_is_not_taken() -> None:
    async def use(compiler):
        assert await compiler.compile(StructuredOutputsParams(regex="a"))
        compiler._sandbox._process.stdin.write(b'[-1, ["regex", "stray"]]\n')
        wanted = StructuredOutputsParams(regex="b")
        assert await compiler.compile(wanted) == compile_here(wanted)

    with_compiler(use)


def nested(levels: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_limits_are_checked_before_anything_is_built() -> None:
    StructuredOutputsParams(json=nested(MAX_NESTING - 1))
    for spec in ({"json": nested(MAX_NESTING)}, {"json": nested(5000)}, {"regex": "a" * (MAX_GRAMMAR + 1)}):
        with pytest.raises(InvalidValueError, match=r"characters and 32 levels"):
            StructuredOutputsParams(**spec)
    for spec in ({}, {"regex": "a", "choice": ["b"]}, {"json_object": False}):
        with pytest.raises(InvalidValueError, match="exactly one"):
            StructuredOutputsParams(**spec)
    for choice in ([""], [5]):
        with pytest.raises(InvalidValueError, match="list of strings"):
            StructuredOutputsParams(choice=choice)
    for clash in ({"ignore_eos": True}, {"min_tokens": 2}):
        with pytest.raises(InvalidValueError, match="does not go with"):
            SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), **clash)
