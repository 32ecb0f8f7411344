"""How Triton's kernels are launched: side by side when they compile, and without Triton's own 70 µs when they run.

Kernels are written and called as Triton's (`kernel[grid](...)`). Inside the two contexts here that call does something
else, for this process: nothing in Triton can be told to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from subprocess import DEVNULL, PIPE
from typing import Any

import torch
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_MOST_THREADS = 16
_Key = tuple[object, ...]


@contextmanager
def only_compiling() -> Iterator[None]:
    """A launch only asks for its kernel; leaving waits until all are compiled, by other processes, and loaded."""
    asked: dict[_Key, Callable[[], Any]] = {}

    def ask(kernel: Any, grid: object, *args: object, **constants: object) -> None:
        key, _ = _specialised(kernel, args, constants)
        asked.setdefault(key, partial(kernel.run, *args, grid=grid, warmup=True, **constants))

    with _launching_by(ask):
        yield
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    _compile_aside(_wanted(asked.values()), threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_load, asked.values()))


def _wanted(runs: Iterable[Callable[[], Any]]) -> list[str]:
    """What Triton would compile for these launches, as it writes that down."""
    found: dict[str, None] = {}

    def note(*, compile: dict[str, Any], **_: object) -> bool:
        found[compile["specialization_data"]] = None
        return True  # and do not compile it

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        for run in runs:
            run()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found)


def _compile_aside(wanted: list[str], most: int) -> None:
    """Fills Triton's cache. What fails there will fail again, and say why, where the kernel is loaded."""
    command = [sys.executable, "-m", "octavo.runtime.cuda.compiling", str(driver.active.get_current_target().arch)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parts = [wanted[i::most] for i in range(min(most, len(wanted)))]
    with ExitStack() as stack:
        for part in parts:
            process = stack.enter_context(subprocess.Popen(command, stdin=PIPE, stdout=DEVNULL, env=env, text=True))
            assert process.stdin is not None
            process.stdin.write("\n".join(part))
            process.stdin.close()


def _load(run: Callable[[], Any]) -> None:
    """Puts a compiled kernel on the device, which `run` does when first asked for."""
    assert run().run is not None


@contextmanager
def quick_launches() -> Iterator[None]:
    """A launch whose kernel was launched before, of arguments of the same kinds, goes straight to the driver's call.

    Triton binds, specialises, hashes and looks at the environment at each launch, and asks the driver about every
    pointer: with three hundred launches that is more than a mixed step takes the device.
    """
    with _launching_by(_launch_quickly):
        yield


@contextmanager
def _launching_by(launch: Callable[..., None]) -> Iterator[None]:
    def get(kernel: Any, grid: object) -> Callable[..., None]:
        return partial(launch, kernel, grid)

    before = JITFunction.__dict__.get("__getitem__")
    JITFunction.__getitem__ = get  # what `kernel[grid]` calls
    try:
        yield
    finally:
        if before is None:
            del JITFunction.__getitem__
        else:
            JITFunction.__getitem__ = before


def _launch_quickly(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    key, values = _specialised(kernel, args, constants)
    known = _KNOWN.get(key)
    if known is None:
        compiled = kernel.run(*args, grid=grid, warmup=False, **constants)
        is_constant = [parameter.is_constexpr for parameter in kernel.params]
        if not any(is_constant[: len(args)]) and all(is_constant[len(args) :]):
            tail = [constants[parameter.name] for parameter in kernel.params[len(args) :]]
            _KNOWN[key] = (compiled.run, compiled.function, compiled.packed_metadata, tail)
        return
    run, function, metadata, tail = known
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(torch.cuda.current_device())
    run(x, y, z, stream, function, metadata, None, None, None, *values, *tail)


_KNOWN: dict[_Key, tuple[Any, Any, Any, list[Any]]] = {}


def _specialised(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[_Key, list[Any]]:
    """What decides which compiled kernel a launch needs, at least; and the arguments, tensors as addresses."""
    kinds: list[object] = [id(kernel)]
    values = []
    for argument in args:
        if isinstance(argument, torch.Tensor):
            address = argument.data_ptr()
            kinds.append((argument.dtype, address % 16 == 0))
            values.append(address)
            continue
        if isinstance(argument, int):
            kinds.append(argument == 1 or (argument % 16 == 0, argument.bit_length() > 31))
        else:
            kinds.append(type(argument))
        values.append(argument)
    return (*kinds, *constants.items()), values
