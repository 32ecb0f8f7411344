"""Tool calls and reasoning in what a model writes: which text is content, which is thought, which calls a function.

Models were trained on one form each; `--tool-call-parser` and `--reasoning-parser` name it. Text goes through as it
comes, except where it may be the beginning of a mark; a call is told when it is complete. What looked like a call and
cannot be read is given as text, never dropped.
"""

from __future__ import annotations

import ast
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_CALL = 1 << 18  # characters of calls that are read; longer ones are text
THINK, UNTHINK = "<think>", "</think>"
REASONING_PARSERS = ("qwen3", "deepseek_r1")
Call = tuple[str, str]  # name, arguments as JSON
Delta = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """How a family of models writes calls: between `begin` and `end` (or the text's end), anywhere in the text; or,
    with an empty `begin`, as the whole text, which then starts with one of `openings`."""

    read: Callable[[str], list[Call]]  # raises ValueError
    begin: str = ""
    end: str = ""
    openings: tuple[str, ...] = ()
    needs_special_tokens: bool = False


def _object(value: Any) -> Call:
    """One call as a JSON object."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call")
    arguments = value.get("arguments", value.get("parameters", {}))
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _read_json(text: str) -> list[Call]:
    """One object, several behind each other (with or without a semicolon), or a list of them."""
    decoder, calls, at = json.JSONDecoder(), [], 0
    text = text.strip().removeprefix("<|python_tag|>").strip()
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        calls += [_object(one) for one in (value if isinstance(value, list) else [value])]
        while at < len(text) and text[at] in "; \n\t":
            at += 1
    return calls


def _read_mistral(text: str) -> list[Call]:
    """A list of objects, or name{arguments} once or several times, each behind [TOOL_CALLS]."""
    if text.lstrip().startswith(("[", "{")):
        return _read_json(text)
    calls = []
    for part in filter(str.strip, text.split("[TOOL_CALLS]")):
        name, brace, rest = part.replace("[ARGS]", "").partition("{")
        arguments, _ = json.JSONDecoder().raw_decode(brace + rest)
        calls.append((name.strip(), json.dumps(arguments, ensure_ascii=False)))
    return calls


def _read_python(text: str) -> list[Call]:
    """A Python list of calls with keyword arguments, all literals: parsed, never run."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else []
        calls = []
        for node in nodes:
            if not isinstance(node, ast.Call) or node.args or not all(k.arg for k in node.keywords):
                raise ValueError("no call")
            arguments = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            calls.append((ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False)))
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("no call") from error
    return calls


TOOL_PARSERS = {
    "hermes": Form(_read_json, begin="<tool_call>", end="</tool_call>"),
    "llama3_json": Form(_read_json, openings=("{", "<|python_tag|>"), needs_special_tokens=True),
    "mistral": Form(_read_mistral, begin="[TOOL_CALLS]", needs_special_tokens=True),
    "pythonic": Form(_read_python, openings=("[",)),
}
TOOL_PARSERS["qwen"] = TOOL_PARSERS["hermes"]
REQUIRED = Form(_read_json, openings=("[", "{"))  # what the grammar of tool_choice required makes


class _Split:
    """One stage: text in, deltas out. What is held back may be the beginning of a mark."""

    def __init__(self) -> None:
        self.held = ""

    def until(self, mark: str) -> tuple[str, bool]:
        """Takes the held text up to `mark`, which is dropped; without it, all that cannot be its beginning."""
        at = self.held.find(mark)
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
            if begin.startswith(THINK):
                self.held = begin[len(THINK) :]
        thought = ""
        if self._state == "thought":
            thought, ended = self.until(UNTHINK)
            if not ended:
                thought, self.held = (thought + self.held, "") if last else (thought, self.held)
                return thought if self._shown else "", ""
            self._state = "answer"
        answer, self.held = self.held, ""
        return thought if self._shown else "", answer


class Calls(_Split):
    """Splits calls from content."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self._form = form
        self._state = "text" if form.begin else "start"
        self.found = False

    def feed(self, text: str, *, last: bool = False) -> list[str | Call]:
        """Content and calls in some more text, in their order."""
        self.held += text
        out: list[str | Call] = []
        if self._state == "start":
            begin = self.held.lstrip()
            if begin.startswith(self._form.openings):
                self._state = "call"
            elif not last and any(opening.startswith(begin) for opening in self._form.openings):
                return []
            else:
                self._state = "plain"
        while self._state == "text":
            content, found = self.until(self._form.begin)
            out.append(content)
            if not found or not self._call(out, last=last):
                break
        if self._state == "call":
            self._call(out, last=last)
        if self._state == "plain" or last:
            out.append(self.held)
            self.held = ""
        return [piece for piece in out if piece and not (self.found and isinstance(piece, str) and piece.isspace())]

    def _call(self, out: list[str | Call], *, last: bool) -> bool:
        """Reads a call if it is complete; True when text follows it."""
        self._state = "call"
        form = self._form
        at = self.held.find(form.end) if form.end else -1
        if at < 0 and not last and len(self.held) <= MAX_CALL:
            return False
        body, rest = (self.held[:at], self.held[at + len(form.end) :]) if at >= 0 else (self.held, "")
        self.held = rest
        self._state = "text" if form.begin else "plain"
        try:
            calls = form.read(body) if len(body) <= MAX_CALL else []
        except (ValueError, RecursionError):
            calls = []
        out.extend(calls or [form.begin + body + (form.end if at >= 0 else "")])
        self.found = self.found or bool(calls)
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
        for piece in self._calls.feed(text, last=last) if self._calls else [text]:
            if isinstance(piece, str):
                if piece:
                    deltas.append({"content": piece})
            elif not (self._single and self.num_calls):
                deltas.append({"tool_calls": [{"index": self.num_calls, **call_object(*piece)}]})
                self.num_calls += 1
        return deltas


def call_object(name: str, arguments: str) -> dict[str, Any]:
    """OpenAI's tool call."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def whole_message(deltas: list[Delta]) -> dict[str, Any]:
    """The message that these deltas add up to."""
    text = "".join(delta.get("content", "") for delta in deltas)
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
    calls = [{k: v for k, v in call.items() if k != "index"} for d in deltas for call in d.get("tool_calls", ())]
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = calls
    return message
