"""Tool calls and reasoning in what a model writes: which text is content, which is thought, which calls a function.

Models were trained on one form each; `--tool-call-parser` and `--reasoning-parser` name it. Text goes through as it
comes, except where it may be the beginning of a mark. A call is told by its name, then by its arguments as they are
written (a Python literal when it is complete); what these are does not depend on how the text was cut into pieces. What
looked like a call and is none is given as text; what breaks off inside a call's arguments leaves them unfinished.
"""

import ast
import json
import re
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

MAX_CALL = 1 << 18  # characters of a call, or of a Python literal, that is read as a whole; a longer one is text
MAX_HEAD = 256  # characters before the arguments of a call that begins with its name
BLANKS = " \t\r\n"
THINK, UNTHINK = "<think>", "</think>"
REASONING_PARSERS = ("qwen3", "deepseek_r1")
Piece = tuple[str, str]  # content, the name of a call, or some more of its arguments
Delta = dict[str, Any]
_NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)
_HEAD = r'\{ "name" : "([^"\\]{1,64})" , "(?:arguments|parameters)" : (?=\{)'.replace(" ", r"\s{0,20}")
_NAMED = r"|([\w.-]{1,64})\s{0,20}(?:\[CALL_ID\]\w{0,64})?(?:\[ARGS\])?\s{0,20}(?=\{)"


@dataclass(frozen=True, slots=True)
class Form:
    """How a family of models writes calls: between `begin` and `end` (or the text's end), anywhere in the text; or,
    with an empty `begin`, as the whole text, which then starts with one of `openings`.

    Attributes:
        between: what may stand before, between and behind calls.
        head: what a call begins with, up to its arguments; its group is the name.
        is_python: calls are Python's, not JSON objects.
        named: the function whose arguments are all there is.
        answer: the grammar of a text with such calls (call_grammar.py), of which `call` and `named` are the tools',
            PLAIN is what does not begin with an opening; between @ stands what makes it several calls.
    """

    begin: str = ""
    end: str = ""
    openings: tuple[str, ...] = ()
    between: str = r"[\s,;\[\]]*"
    head: str = _HEAD
    is_python: bool = False
    needs_special_tokens: bool = False
    named: str = ""
    answer: str = ""


TOOL_PARSERS = {
    "hermes": Form(
        "<tool_call>",
        "</tool_call>",
        answer=r"""mark[lazy]: TEXT "<tool_call>"
one: mark SPACE call SPACE "</tool_call>"
answer: (one @one*@)? TEXT""",
    ),
    "llama3_json": Form(
        openings=("{", "<|python_tag|>"),
        between=r"(?:[\s,;\[\]]|<\|python_tag\|>)*",
        needs_special_tokens=True,
        answer=r"""answer: PLAIN | (TAG | SPACE "<|python_tag|>")? SPACE call @(SPACE ";" SPACE call)*@ SPACE
TAG: /[ \t\r\n]*<\|python_tag\|>/""",
    ),
    "mistral": Form(
        "[TOOL_CALLS]",
        between=r"(?:[\s,;\]]|\[(?=[^T])|\[TOOL_CALLS\])*",
        head=_HEAD + _NAMED,
        needs_special_tokens=True,
        answer=r"""mark[lazy]: TEXT /\[TOOL_CALLS\]/
args: "[ARGS]"
list: "[" SPACE call @(SPACE "," SPACE call)*@ SPACE "]"
answer: TEXT | (mark | TEXT "[TOOL_CALLS]") SPACE (list | named @("[TOOL_CALLS]" named)*@) SPACE""",
    ),
    "pythonic": Form(
        openings=("[",),
        head=r"([\w.-]{1,64})\s{0,20}\(",
        is_python=True,
        answer=r"""answer: PLAIN | SPACE "[" SPACE call @("," SPACE call)*@ SPACE "]" SPACE""",
    ),
}
TOOL_PARSERS["qwen"] = TOOL_PARSERS["hermes"]
REQUIRED = Form(openings=("[", "{"))  # what the grammar of tool_choice required makes


def _keyword(text: str) -> str:
    """A keyword argument, a literal of JSON or Python that is parsed and never run, as a member of a JSON object.

    Raises what _NO_LITERAL lists.
    """
    name, _, value = text.partition("=")
    if not name.strip().isidentifier():
        raise ValueError("no keyword argument")
    try:
        literal = json.loads(value)
    except ValueError:
        literal = ast.literal_eval(value.strip())
    return f'"{name.strip()}": {json.dumps(literal, ensure_ascii=False, allow_nan=False)}'


class _Brackets:
    """Finds the end of an open bracket in JSON or in Python's literals, which may come in pieces."""

    def __init__(self, *, depth: int, quotes: str, stop: str) -> None:
        self._depth, self._quotes, self._stop = depth, quotes, stop
        self._quote = ""  # inside a string: how it ends
        self._escaped = False

    def find(self, text: str) -> int:
        """Where in some more text the bracket is closed, or `stop` stands (a comma: at its own level); else -1."""
        for at, letter in enumerate(text):
            if self._quote:
                if self._escaped or letter == "\\":
                    self._escaped = not self._escaped
                elif letter == self._quote:
                    self._quote = ""
            elif letter in self._quotes:
                self._quote = letter
            elif letter in "([{":
                self._depth += 1
            elif letter in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    return at
            elif letter == self._stop and (letter != "," or self._depth == 1):
                return at
        return -1


class _Split:
    """One stage: text in, deltas out. What is held back may be the beginning of a mark."""

    def __init__(self) -> None:
        self.held = ""

    def until(self, mark: str) -> tuple[str, bool]:
        """Takes the held text up to `mark`, which is dropped; without it, all that cannot be its beginning."""
        at = self.held.find(mark) if mark else -1
        if at >= 0:
            text, self.held = self.held[:at], self.held[at + len(mark) :]
            return text, True
        keep = next((n for n in range(min(len(mark) - 1, len(self.held)), 0, -1) if mark.startswith(self.held[-n:])), 0)
        cut = len(self.held) - keep
        text, self.held = self.held[:cut], self.held[cut:]
        return text, False


class Reasoning(_Split):
    """Splits thought from answer. `opened`: the prompt has the opening mark already."""

    def __init__(self, *, opened: bool, shown: bool) -> None:
        super().__init__()
        self._state = "start"
        self._opened = opened
        self._shown = shown

    def feed(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """(thought, answer) in some more text."""
        self.held += text
        if self._state == "start":
            begin = self.held.lstrip()
            if not last and THINK.startswith(begin):
                return "", ""
            self._state = "thought" if self._opened or begin.startswith(THINK) else "answer"
            self.held = begin[len(THINK) :] if begin.startswith(THINK) else self.held
        thought = answer = ""
        if self._state == "thought":
            thought, ended = self.until(UNTHINK)
            if ended:
                self._state = "answer"
            elif last:
                thought += self.held
        if self._state == "answer":
            answer, self.held = self.held, ""
        return thought if self._shown else "", answer


class Calls(_Split):
    """Splits calls from content."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self._form = form
        self._between, self._head = re.compile(form.between), re.compile(form.head)
        self._last = False
        self._out: list[Piece] = []
        self._unread = ""  # before what may be a call: content, if it is none
        self._has_called = False  # just now: blanks behind a call are nobody's
        self._steps = self._run()

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        """Content, names and arguments in some more text, in their order."""
        self.held += text
        self._last = last
        next(self._steps, None)
        out, self._out = self._out, []
        return out

    def _say(self, kind: str, text: str) -> None:
        if kind == "content":
            text = text.lstrip(BLANKS) if self._has_called else text
            self._has_called = self._has_called and not text
        elif kind == "call":
            self._unread = ""
            self._has_called = True
        if text or kind == "call":
            self._out.append((kind, text))

    def _run(self) -> Iterator[None]:
        """Reads it all; yields where more text is needed."""
        form = self._form
        if not form.begin:
            while not (begin := self.held.lstrip(BLANKS)).startswith(form.openings):
                if self._last or not any(opening.startswith(begin) for opening in form.openings):
                    break
                yield
            else:
                yield from self._calls()
        while True:
            content, found = self.until(form.begin)
            self._say("content", content)
            if found:
                yield from self._calls()
            elif self._last:
                break
            else:
                yield
        self._say("content", self.held)

    def _calls(self) -> Iterator[None]:
        """Calls behind each other; ends before anything else."""
        form = self._form
        self._unread, told = form.begin, False
        while True:
            rest = self._between.sub("", self.held, count=1)
            self._unread += self.held[: len(self.held) - len(rest)]
            self.held = rest
            if form.end and rest.startswith(form.end):
                self.held = rest[len(form.end) :]
                self._unread += form.end
                break
            marks = (form.begin, form.end, *form.openings)
            if not self._last and any(mark != rest and mark.startswith(rest) for mark in marks):
                yield
                continue
            if not (yield from self._python_call() if form.is_python else self._json_call()):
                break
            told = True
        self._say("content", "" if told else self._unread)

    def _json_call(self) -> Generator[None, None, bool]:
        """Reads an object, or a name and an object; False if there is none."""
        form = self._form
        brackets, seen = _Brackets(depth=0, quotes='"', stop=form.end[:1]), 0
        while not (head := self._head.match(self.held)):
            if self.held.startswith("{"):
                at = brackets.find(self.held[seen:])
                if at >= 0:
                    return self._whole(seen + at + 1)
                seen = len(self.held)
            elif form.head == _HEAD or "{" in self.held or len(self.held) >= MAX_HEAD:
                return False
            if self._last or seen > MAX_CALL:
                return False
            yield
        self._say("call", form.named or head[head.lastindex or 0])
        self.held = self.held[head.end() :]
        yield from self._through(depth=0, told=True)
        if head[0].startswith("{"):
            yield from self._through(depth=1, told=False)  # the rest of the call
        return True

    def _whole(self, end: int) -> bool:
        """Reads an object that does not begin with the name and the arguments of a call."""
        try:
            call = json.loads(self.held[:end] if end <= MAX_CALL else "")
        except (ValueError, RecursionError):
            return False
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return False
        arguments = call.get("arguments", call.get("parameters", {}))
        self._say("call", call["name"])
        self._say("arguments", arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))
        self.held = self.held[end:]
        return True

    def _through(self, *, depth: int, told: bool) -> Iterator[None]:
        """Takes the text up to the end of a bracket."""
        brackets = _Brackets(depth=depth, quotes='"', stop=self._form.end[:1])
        while True:
            at = brackets.find(self.held)
            end = len(self.held) if at < 0 else at + (self.held[at] == "}")
            self._say("arguments", self.held[:end] if told else "")
            self.held = self.held[end:]
            if at >= 0 or self._last:
                return
            yield

    def _python_call(self) -> Generator[None, None, bool]:
        """Reads a call with keyword arguments, each when it is complete; False if there is none, or it goes wrong."""
        while not (head := self._head.match(self.held)):
            if self._last or "(" in self.held or len(self.held) >= MAX_HEAD:
                return False
            yield
        begin, sign = head.end(), "{"
        while sign != "}":
            brackets, seen = _Brackets(depth=1, quotes="\"'", stop=","), begin
            while (at := brackets.find(self.held[seen:])) < 0:
                seen = len(self.held)
                if self._last or seen > MAX_CALL:
                    return False
                yield
            text, closed = self.held[begin : seen + at], self.held[seen + at] == ")"
            try:
                argument = _keyword(text) if text.strip() or not closed else ""
            except _NO_LITERAL:
                return False
            if self.held[seen + at] not in ",)":
                return False
            if sign == "{":
                self._say("call", head[1])
            self._say("arguments", (sign if argument or sign == "{" else "") + argument + "}" * closed)
            self.held, begin, sign = self.held[seen + at + 1 :], 0, "}" if closed else ", "
        return True


class Message:
    """The deltas of one assistant message, as its text grows."""

    def __init__(self, reasoning: Reasoning | None, calls: Calls | None, *, single: bool) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._single = single
        self.num_calls = 0

    def feed(self, text: str, *, last: bool = False) -> list[Delta]:
        """What `text` adds: content, reasoning_content and tool_calls."""
        deltas: list[Delta] = []
        if self._reasoning is not None:
            thought, text = self._reasoning.feed(text, last=last)
            if thought:
                deltas.append({"reasoning_content": thought})
        for kind, piece in self._calls.feed(text, last=last) if self._calls else [("content", text)]:
            self.num_calls += kind == "call"
            if kind == "content":
                deltas += [{"content": piece}] if piece else []
            elif self.num_calls == 1 or not self._single:
                call: dict[str, Any] = {"function": {"arguments": piece}}
                if kind == "call":
                    function = {"name": piece, "arguments": ""}
                    call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
                deltas.append({"tool_calls": [{"index": self.num_calls - 1, **call}]})
        return deltas


def whole_message(deltas: list[Delta]) -> dict[str, Any]:
    """The message that these deltas add up to."""
    text = "".join(delta.get("content", "") for delta in deltas)
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
    calls: list[dict[str, Any]] = []
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        if "id" in part:
            calls.append({"id": part["id"], "type": part["type"], "function": dict(part["function"])})
        else:
            calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message
