"""Grammars of strangers: from what a request asks for to a checked llguidance grammar, in a process that can be killed.

A JSON schema, a regular expression or an EBNF grammar is a program. Here it is parsed and built once, under limits of
size, nesting, memory and seconds, before the engine ever sees it: `python -m octavo.engine.grammar` answers one line of
JSON with another, under the same number. It is started when the first request needs it, and replaced when one made it
too slow or too large, or when nobody waits for its answer any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import OrderedDict
from typing import Any

from octavo.errors import InvalidValueError, UnsupportedError
from octavo.sampling_params import StructuredOutputsParams

MAX_SECONDS = 5.0  # for one grammar
MAX_BYTES = 1 << 30  # of the process
MAX_CACHED = 256  # grammars
MAX_LINE = 1 << 22
# between tokens of JSON: models may indent, but not write blanks for ever
WHITESPACE = r"[\x20\x0A]{0,20}"
_SYMBOLS = 100_000  # in a grammar's productions
_INSTALL = "structured output needs the package llguidance: pip install llguidance"


def to_grammar(kind: str, spec: Any) -> str:
    """The llguidance grammar of a specification, checked. `kind` is a field of StructuredOutputsParams.

    Raises ValueError with what is wrong.
    """
    from llguidance import LLMatcher, LLParserLimits, grammar_from

    if kind == "json_object":
        spec = {"type": "object"}
    if kind in ("json", "json_object"):
        text = spec if isinstance(spec, str) else json.dumps(spec)
        grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
    elif kind == "regex":
        grammar = LLMatcher.grammar_from_regex(spec)
    elif kind == "choice":
        grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, spec)))
    else:
        grammar = grammar_from("gbnf", spec)  # Lark as well
    limits = LLParserLimits(max_grammar_size=_SYMBOLS, verbose_errors=False)
    problem = LLMatcher.validate_grammar(grammar, limits=limits)
    if problem and not problem.startswith("WARNING"):
        raise ValueError(problem.splitlines()[0])
    return str(grammar)


def compile_here(asked: StructuredOutputsParams) -> str:
    """The grammar of a request, built in this process: for a caller who is trusted (offline).

    Raises InvalidValueError: no such grammar can be built. UnsupportedError: llguidance is not installed.
    """
    try:
        return to_grammar(*asked.chosen)
    except ImportError as error:
        raise UnsupportedError(_INSTALL) from error
    except Exception as error:
        raise _refusal(asked, str(error)) from error


class GrammarCompiler:
    """Builds grammars in a process of its own, one after the other; what was built is kept."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._num_asked = 0
        self._built: OrderedDict[str, str] = OrderedDict()

    async def compile(self, asked: StructuredOutputsParams) -> str:
        """The grammar of a request. Raises InvalidValueError where it cannot be built within the limits."""
        line = json.dumps(asked.chosen)
        if (known := self._built.get(line)) is not None:
            self._built.move_to_end(line)
            return known
        async with self._lock:
            try:
                reply = await asyncio.wait_for(self._ask(asked.chosen), MAX_SECONDS)
            except TimeoutError:
                self._kill()
                raise _refusal(asked, f"it took longer than {MAX_SECONDS:g} s to build: simplify it") from None
            except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
                self._kill()
                raise _refusal(asked, "it is too large to build: simplify it") from None
            except BaseException:  # who asked is gone: the next one must not read the answer
                self._kill()
                raise
        if "error" in reply:
            raise _refusal(asked, reply["error"])
        self._built[line] = grammar = str(reply["grammar"])
        if len(self._built) > MAX_CACHED:
            self._built.popitem(last=False)
        return grammar

    async def close(self) -> None:
        """Ends the process."""
        if (process := self._kill()) is not None:
            await process.wait()

    def _kill(self) -> asyncio.subprocess.Process | None:
        """Ends the process at once, whatever it does; the next grammar gets another one."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        return process

    async def _ask(self, chosen: tuple[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            command = [sys.executable, "-m", "octavo.engine.grammar"]
            self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=MAX_LINE)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._num_asked += 1
        stdin.write(json.dumps([self._num_asked, *chosen]).encode() + b"\n")
        await stdin.drain()
        while True:
            reply: dict[str, Any] = json.loads(await stdout.readuntil(b"\n"))
            if reply["number"] == self._num_asked:
                return reply


def _refusal(asked: StructuredOutputsParams, reason: str) -> InvalidValueError:
    return InvalidValueError(f"{asked.chosen[0]}: no grammar can be built: {reason:.500}", param=asked.asked_as)


def main() -> None:
    """Answers lines until there are no more."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    for line in sys.stdin:
        number, kind, spec = json.loads(line)
        try:
            reply = {"grammar": to_grammar(kind, spec)}
        except ImportError:
            reply = {"error": _INSTALL}
        except Exception as error:
            reply = {"error": str(error) or type(error).__name__}
        print(json.dumps({"number": number, **reply}), flush=True)


if __name__ == "__main__":
    main()
