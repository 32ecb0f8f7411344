"""Grammars of strangers: from what a request asks for to a checked llguidance grammar, in a process that can be killed.

A JSON schema, a regular expression or an EBNF grammar is a program. It is parsed and built once, under limits of size,
nesting, memory and seconds, before the engine ever sees it, by `python -m octavo.engine.grammar` (sandbox.py), which is
started when the first request needs it.
"""

import json
from collections import OrderedDict
from typing import Any

from octavo.engine.sandbox import Sandbox, SandboxError, serve
from octavo.errors import InvalidValueError, UnsupportedError
from octavo.sampling_params import StructuredOutputsParams

MAX_SECONDS = 5.0  # for one grammar
MAX_BYTES = 1 << 30  # of the process
MAX_WAITING = 64  # requests whose grammar is not built yet
MAX_CACHED = 256  # grammars, and refusals
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
    """Builds grammars in a process of its own. What was built is kept, and so is why something was not."""

    def __init__(self) -> None:
        self._sandbox = Sandbox("octavo.engine.grammar", seconds=MAX_SECONDS, max_waiting=MAX_WAITING)
        self._known: OrderedDict[str, dict[str, str]] = OrderedDict()
        self.close = self._sandbox.close

    async def compile(self, asked: StructuredOutputsParams) -> str:
        """The grammar of a request.

        Raises InvalidValueError: it cannot be built within the limits. QueueFullError: too many wait for theirs.
        """
        line = json.dumps(asked.chosen)
        reply = self._known.pop(line, None)
        if reply is None:
            try:
                reply = await self._sandbox.ask(asked.chosen)
            except SandboxError as error:  # not kept: another time it may be faster
                raise _refusal(asked, str(error)) from None
        self._known[line] = reply
        if len(self._known) > MAX_CACHED:
            self._known.popitem(last=False)
        if "refusal" in reply:
            raise _refusal(asked, reply["refusal"])
        return reply["grammar"]


def _refusal(asked: StructuredOutputsParams, reason: str) -> InvalidValueError:
    return InvalidValueError(f"{asked.chosen[0]}: no grammar can be built: {reason:.500}", param=asked.asked_as)


def _build(question: Any) -> dict[str, str]:
    try:
        return {"grammar": to_grammar(*question)}
    except ImportError:
        return {"refusal": _INSTALL}
    except ValueError as error:
        return {"refusal": str(error)}


if __name__ == "__main__":
    serve(_build, max_bytes=MAX_BYTES)
