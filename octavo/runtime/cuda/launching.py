"""How Triton's kernels are launched: side by side when they compile, and without Triton's own 70 µs when they run.

Kernels are written and called as Triton's (`kernel[grid](...)`). Inside the two contexts here that call does something
else, for this process: nothing in Triton can be told to.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import PIPE
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import cache
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_MOST_THREADS = 16
_Key = tuple[object, ...]


def compile_kernels(launch: Callable[[], None], meanwhile: Callable[[], None]) -> None:
    """Compiles what `launch` would launch, by other processes, does something `meanwhile`, and loads the kernels."""
    asked: dict[_Key, Callable[[], Any]] = {}

    def ask(kernel: Any, grid: object, *args: object, **constants: object) -> None:
        key, _ = _specialised(kernel, args, constants)
        asked.setdefault(key, partial(kernel.run, *args, grid=grid, warmup=True, **constants))

    with _launching_by(ask):
        launch()
    wanted = _wanted(asked.values())
    names = sorted(kernel.cache_key + text for text, (kernel, _) in wanted.items())
    done = Path(knobs.cache.dir, "octavo-" + hashlib.sha256("".join([triton.__version__, *names]).encode()).hexdigest())
    done.parent.mkdir(parents=True, exist_ok=True)
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    # one start at a time: what calls a kernel must not be replaced by another process while it is loaded
    with done.with_name("octavo.lock").open("w") as lock, ThreadPoolExecutor(threads) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        count = 0 if done.exists() else threads  # then all of them lie beside it, in Triton's cache
        compiling = pool.map(_compile_aside, [iter(_jobs(wanted))] * count)
        meanwhile()
        list(compiling)
        done.touch()
        list(pool.map(_load, [run for _, run in wanted.values()]))


def _jobs(wanted: dict[str, tuple[Any, Callable[[], Any]]]) -> list[str]:
    """Lines for `compiling`, what takes longest first; of kernels that are called alike, one brings what calls them."""
    callers: set[str] = set()
    jobs = []
    for text in sorted(wanted, key=lambda text: -len(wanted[text][0].src)):
        parts = json.loads(text)
        caller = json.dumps([parts["signature"], parts["constant_keys"]])
        jobs.append(f"{'kernel' if caller in callers else 'caller'} {text}")
        callers.add(caller)
    return jobs


def _wanted(runs: Iterable[Callable[[], Any]]) -> dict[str, tuple[Any, Callable[[], Any]]]:
    """What Triton would compile for these launches, as it writes that down: of which function, by which launch."""
    found: dict[str, tuple[Any, Callable[[], Any]]] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        found[compile["specialization_data"]] = (fn.jit_function, run)
        return True  # and do not compile it

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        for run in runs:
            run()
    finally:
        knobs.runtime.jit_cache_hook = before
    return found


def _compile_aside(jobs: Iterator[str]) -> None:
    """Fills Triton's cache by a process. What fails there will fail again, and say why, where the kernel is loaded."""
    arch = driver.active.get_current_target().arch
    command = [sys.executable, "-m", "octavo.runtime.cuda.compiling", str(arch), cache.triton_key()]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, env=env, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for job in jobs:  # which all processes share
            print(job, file=process.stdin, flush=True)
            if not process.stdout.readline():
                return


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
