"""`octavo doctor`: what this machine has, and for each thing it lacks one sentence and one command."""

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import typer

from octavo import __version__
from octavo.cli.terminal import console, say, size_text
from octavo.config import DEFAULT_MODEL, EngineConfig
from octavo.errors import ConfigError, OctavoError
from octavo.server.address import bind

MIN_FREE_MEMORY = 1 << 30  # the default model, its KV cache and the server
MIN_FREE_DISK = 1 << 30
DEFAULT_PORT = 8000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `problem` says what is wrong, `command` what to do; both empty when all is well."""

    name: str
    found: str
    problem: str = ""
    command: str = ""


def doctor() -> None:
    """Check this machine: Python, compiler, kernels, cores, memory, cache, default model, port.

    Exits with 1 when something would keep the default model from being served.
    """
    from rich.text import Text

    findings = [look() for look in CHECKS]
    width = max(len(f.name) for f in findings)
    say(f"Octavo {__version__}", style="bold")
    for f in findings:
        mark = ("no", "bold red") if f.problem else ("ok", "green")
        console().print(Text.assemble("  ", mark, f"  {f.name:<{width}}  {f.found}"))
    problems = [f for f in findings if f.problem]
    for f in problems:
        say()
        console().print(Text.assemble((f"{f.name}: ", "bold"), f.problem))
        say(f"    {f.command}")
    if problems:
        raise typer.Exit(1)
    say("\nNothing is missing. `octavo serve` starts the server.")


def _python() -> Finding:
    return Finding("python", f"{platform.python_version()} ({sys.executable})")


def _compiler() -> Finding:
    from octavo.runtime.native.build import BuildError, find_compiler

    try:
        return Finding("compiler", " ".join(find_compiler()))
    except BuildError:
        if not _kernels().problem:
            return Finding("compiler", "none found; needed only to build the kernels again")
        problem = "The kernels are built with a C++20 compiler."
        return Finding("compiler", "none found", problem, "sudo apt install g++")


def _kernels() -> Finding:
    from octavo.runtime.native.library import REBUILD, resolve_level

    try:
        return Finding("kernels", f"native library, {resolve_level('auto')} level")
    except ConfigError as error:
        return Finding("kernels", "none", f"{error}", REBUILD.split("`")[1])


def _cores() -> Finding:
    usable = EngineConfig().threads()
    return Finding("cores", f"{usable} of {os.cpu_count()}, {platform.machine()}")


def _memory() -> Finding:
    from octavo.worker.memory import free_memory

    try:
        free = free_memory()
    except OctavoError as error:
        return Finding("memory", "unknown", str(error), "octavo serve --kv-cache-memory-bytes 256MiB")
    found = f"{size_text(free)} free"
    if free < MIN_FREE_MEMORY:
        problem = "That is little even for the default model: end something, or take a short context."
        return Finding("memory", found, problem, "octavo serve --max-model-len 1k --max-num-seqs 4")
    return Finding("memory", found)


def _cache() -> Finding:
    from octavo.models.hub import cache_folder

    try:
        folder = cache_folder()
    except ConfigError as error:
        return Finding("cache", "none", str(error), "export OCTAVO_CACHE=/a/folder/of/yours")
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    found = f"{folder}, {size_text(free)} free"
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Finding("cache", found, "The cache folder cannot be written.", "export OCTAVO_CACHE=/a/folder/of/yours")
    if free < MIN_FREE_DISK and not _default_model_path():
        problem = "There is little room for models: free some, or put the cache elsewhere."
        return Finding("cache", found, problem, "export OCTAVO_CACHE=/a/larger/disk")
    return Finding("cache", found)


def _default_model_path() -> Path | None:
    from octavo.models.hub import cached_models

    try:
        return cached_models().get(DEFAULT_MODEL)
    except ConfigError:
        return None  # as _cache() tells


def _default_model() -> Finding:
    path = _default_model_path()
    if path is None:
        problem = "The default model is fetched on first use."
        return Finding("model", f"{DEFAULT_MODEL} is not here yet", problem, "octavo pull smollm2")
    return Finding("model", f"{DEFAULT_MODEL}, {path}")


def _port() -> Finding:
    try:
        bind("127.0.0.1", DEFAULT_PORT).close()
    except ConfigError:
        problem = f"Something listens on port {DEFAULT_PORT} already: take another."
        return Finding("port", f"{DEFAULT_PORT} is taken", problem, "octavo serve --port 8001")
    return Finding("port", f"{DEFAULT_PORT} is free")


CHECKS = (_python, _compiler, _kernels, _cores, _memory, _cache, _default_model, _port)
