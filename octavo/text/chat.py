"""Chat templates: the Jinja program in a model's files that turns messages into its prompt format.

A template is a program by a stranger. It comes from the model's files or from the operator (`--chat-template`), never
from a request, and still runs under four limits: Jinja's immutable sandbox (no access to Python's internals, no change
to what it is given); a number of steps (turns of a loop and calls); seconds; and the size of its output and of each
value on the way. The checks are woven into the template when it is compiled, so a template that loops, recurses or
doubles a string ends in an error. What they do not cover is one single built-in call that is slow or large by itself: a
server renders in a process that it can kill (engine/template.py).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo.errors import InvalidValueError, ModelFileError, UnsupportedParameterError

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

MAX_STEPS = 500_000
MAX_SECONDS = 5.0
MAX_SIZE = 1 << 22  # characters of a string, elements of a list, bits of a number
_SIZED = (str, list, tuple, dict)
_OPEN_END = f"{secrets.randbits(128)} "  # nobody can know it; the blank is gone where a template trims


class TemplateLimitError(jinja2.TemplateError):
    """A template ran into one of the limits above."""


class ChatTemplate:
    """One compiled chat template. The names it sees are those of Hugging Face's `apply_chat_template`.

    These are `messages`, `tools`, `add_generation_prompt`, the model's special tokens (`bos_token`, ...), the functions
    `raise_exception` and `strftime_now`, and a `tojson` that does not escape HTML. Encode the result with
    `add_special_tokens=False`: the template has written them.

    Args:
        source: Jinja.
        tokenizer: gives the special tokens; None when there is no tokenizer.

    Raises:
        ModelFileError: the template does not compile.
    """

    def __init__(self, source: str, tokenizer: Tokenizer | None) -> None:
        self.source = source
        self.special_tokens = dict(tokenizer.special_tokens) if tokenizer is not None else {}
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelFileError(f"the chat template does not compile: line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages`; `kwargs` are further variables for the template (`enable_thinking`, ...).

        Raises:
            InvalidValueError: the template refused the messages, failed on them, or ran into a limit.
        """
        variables = {**self.special_tokens, **kwargs, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self.run(messages, variables)
        except Exception as error:  # a stranger's program may fail in any way
            reason = str(error) or type(error).__name__
            raise InvalidValueError(f"the chat template refused the messages: {reason}", param="messages") from error

    def run(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt for `messages`, given all variables. Raises whatever the template raises."""
        budget = _budget.set(_Budget())
        try:
            size, parts = 0, []
            for part in self._template.generate({"documents": None, **variables, "messages": messages}):
                size += len(part)
                if size > MAX_SIZE:
                    raise TemplateLimitError(f"its output is longer than {MAX_SIZE} characters")
                parts.append(part)
            return "".join(parts)
        finally:
            _budget.reset(budget)


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates know it: its content is one string (text parts are joined by newlines, null is empty), and
    OpenAI's "developer" is "system". What else it carries is the template's business.

    Raises:
        InvalidValueError: it is no mapping with a role, or its content is neither a string nor parts.
        UnsupportedParameterError: a part that is not text.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidValueError(
            f'a message is {{"role": ..., "content": ...}}, not {str(message)[:60]!r}', param="messages"
        )
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(map(_part_text, content))
    if not isinstance(content, str):
        raise InvalidValueError(
            f"the content of a message is a string or a list of text parts, not {type(content).__name__}",
            param="messages",
        )
    role = "system" if message["role"] == "developer" else message["role"]
    return {**message, "role": role, "content": content}


def _part_text(part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) and kind == "text" else None
    if not isinstance(text, str):
        raise UnsupportedParameterError(
            f"content parts of type {str(kind)[:40]!r} are not supported: give text", param="messages"
        )
    return text


def with_open_end(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, the last one's text ending in a mark: what a template writes behind it is for `cut_at_open_end`.
    (To look for the text itself would find it in a template's own words: "end" stands in `<|im_end|>`.)"""
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _OPEN_END}]


def cut_at_open_end(text: str, messages: list[dict[str, Any]]) -> str:
    """The prompt up to the end of the last of the `messages`, so that the model goes on with it; the blanks that end
    the message go where the template trims.

    Raises InvalidValueError when the mark is not found in what was rendered.
    """
    at = text.rfind(_OPEN_END.rstrip())
    if at < 0:
        raise InvalidValueError("the chat template changes the last message: it cannot be continued", param="messages")
    if text.startswith(_OPEN_END, at):
        return text[:at]
    content = messages[-1]["content"]
    return text[:at].removesuffix(content[len(content.rstrip()) :])


def missing_template(model: str) -> InvalidValueError:
    """The error for chat with a model that brings no template."""
    return InvalidValueError(
        f"{model} has no chat template, so messages cannot be turned into a prompt: start with --chat-template FILE, "
        "or send plain text to /v1/completions",
        param="messages",
    )


class _Budget:
    """What one rendering has left."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise TemplateLimitError(f"it took more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it took longer than {MAX_SECONDS:g} seconds")


_budget: ContextVar[_Budget] = ContextVar("_budget")


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """What a loop iterates over: each turn is a step."""
    budget = _budget.get()
    for item in items:
        budget.spend()
        yield item


@jinja2.pass_context  # so that it is not called, with all that is in it, when a template is compiled
def _measure(_: Context, value: Any) -> Any:
    return _bounded(value)


def _bounded(value: Any) -> Any:
    """What a concatenation, a filter, a sum or a call gave, unless it is too large."""
    size = value.bit_length() if isinstance(value, int) else len(value) if isinstance(value, _SIZED) else 0
    if size > MAX_SIZE:
        raise TemplateLimitError(f"it made a value larger than {MAX_SIZE} characters: shorten the messages")
    return value


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  # declared by the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with steps and sizes counted."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])  # and not computed when a template is compiled

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Weave the limits into the syntax tree: every loop counts its turns, every value that may grow is measured."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "_counted")
        for parent in list(tree.find_all(nodes.Node)):
            for field, value in list(parent.iter_fields()):
                if isinstance(value, list):
                    value[:] = [_measured(child) for child in value]
                else:
                    setattr(parent, field, _measured(value))
        return tree

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call is a step; its result is measured."""
        _budget.get().spend()
        return _bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Powers and repetitions are refused before they are computed, sums measured after."""
        if operator == "**" and abs(right) > 64:
            raise TemplateLimitError("it raised a number to a power above 64")
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, str | list | tuple) and isinstance(times, int) and len(items) * times > MAX_SIZE:
                    raise TemplateLimitError(f"it made a value larger than {MAX_SIZE}")
        return _bounded(super().call_binop(context, operator, left, right))


def _measured(value: Any) -> Any:
    """A syntax node whose value may grow, measured; anything else as it is."""
    grows = isinstance(value, nodes.Concat) or (isinstance(value, nodes.Filter) and value.name != "_counted")
    return _filtered(value, "_bounded") if grows else value


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Environment:
    extensions = [_Generation, loopcontrols]
    # without the optimizer, which computes what is constant when a template is compiled, where nothing is bounded
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
    filters: dict[str, Callable[..., Any]] = {"tojson": _tojson, "_counted": _counted, "_bounded": _measure}
    environment.filters.update(filters)
    environment.globals.update({"raise_exception": _raise_exception, "strftime_now": _strftime_now})
    return environment


_ENVIRONMENT = _environment()
