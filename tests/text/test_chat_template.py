"""Chat templates render what Hugging Face renders, and cannot hang or break out."""

from __future__ import annotations

import re
import time
import tracemalloc
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template
from vectors import templates
from vocabularies import byte_level

from octavo.errors import InvalidValueError, ModelFileError, UnsupportedParameterError
from octavo.text.chat import (
    MAX_SIZE,
    ChatTemplate,
    cut_at_open_end,
    missing_template,
    plain_message,
    with_open_end,
)
from octavo.text.tokenizer import load_tokenizer

TOKENIZER = byte_level()
MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "Is 1 < 2 & é > 🦙?\n"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather in <a> city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "é"}}},
        },
    }
]


def render(source: str, messages: list[dict[str, Any]] = MESSAGES, **variables: Any) -> str:
    return ChatTemplate(source, TOKENIZER).render(messages, **variables)


def huggingface(source: str, messages: list[dict[str, Any]], special_tokens: dict[str, str], **variables: Any) -> str:
    """What `apply_chat_template` of transformers renders."""
    rendered, _ = render_jinja_template([messages], chat_template=source, **special_tokens, **variables)
    return rendered[0]


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
def test_published_templates_equal_transformers(tools: list[dict[str, Any]] | None) -> None:
    """Both render the same, or both fail with the same message (some templates refuse a system role, or need tools)."""
    rendered = 0
    for name, source in templates().items():
        compiled = ChatTemplate(source, TOKENIZER)
        try:
            expected = huggingface(source, MESSAGES, TOKENIZER.special_tokens, tools=tools, add_generation_prompt=True)
        except Exception as refused:
            with pytest.raises(InvalidValueError, match=re.escape(str(refused))):
                compiled.render(MESSAGES, tools=tools)
        else:
            rendered += 1
            assert compiled.render(MESSAGES, tools=tools) == expected, name
    assert rendered >= 60


@pytest.mark.model
def test_smollm2_template_equals_transformers() -> None:
    from octavo.models.hub import resolve_model

    tokenizer = load_tokenizer(resolve_model("smollm2"))
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer)
    for messages in (MESSAGES, MESSAGES[1:2], MESSAGES[1:]):
        for ask in (True, False):
            source, names = tokenizer.chat_template, tokenizer.special_tokens
            expected = huggingface(source, messages, names, add_generation_prompt=ask)
            assert template.render(messages, add_generation_prompt=ask) == expected
    ids = tokenizer.encode(template.render(MESSAGES), add_special_tokens=False)
    assert ids.count(tokenizer.encode("<|im_start|>")[0]) == len(MESSAGES) + 1


def test_the_names_a_template_sees() -> None:
    source = (
        "{{ bos_token }}|{{ messages|length }}|{{ add_generation_prompt }}|{{ tools is none }}|{{ extra }}|"
        "{{ {'b': '<é>', 'a': 1}|tojson }}|{{ strftime_now('%Y')|length }}"
    )
    expected = '<s>|4|False|True|7|{"b": "<é>", "a": 1}|4'
    assert render(source, add_generation_prompt=False, extra=7) == expected


def test_blocks_are_trimmed_and_generation_and_break_work() -> None:
    source = "{% for m in messages %}\n  {% generation %}\n{{ loop.index }}/{{ loop.length }}\n  {% endgeneration %}\n"
    assert render(source + "  {% if loop.index == 2 %}{% break %}{% endif %}\n{% endfor %}\n") == "1/4\n2/4\n"


def test_the_templates_own_message_reaches_the_caller() -> None:
    with pytest.raises(InvalidValueError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"
    with pytest.raises(InvalidValueError, match="has no attribute 'name'"):
        render("{{ messages[0].name.first }}")


RUNAWAYS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "squaring": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling by join": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = [n.x, n.x]|join %}{% endfor %}"
    ),
    "doubling by replace": (
        "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}"
    ),
    "repetition": "{{ 'a' * 9999999999 }}",
    "power": "{{ 9 ** 9999999 }}",
    "output": "{% for i in range(99999) %}{{ 'abcdefgh' * 999 }}{% endfor %}",
}


@pytest.mark.parametrize("source", RUNAWAYS.values(), ids=RUNAWAYS.keys())
def test_runaway_templates_end_in_an_error(source: str) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidValueError, match=r"steps|larger than|longer than|above 64|recursion"):
        render(source)
    assert time.monotonic() - start < 60


def test_long_conversations_are_no_runaways() -> None:
    messages = [{"role": "user", "content": "x" * 500}] * 5000
    rendered = render("{% for m in messages %}<{{ m.role }}>{{ m['content'] }}{% endfor %}", messages)
    assert len(rendered) == 5000 * 506 < MAX_SIZE


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ render.__globals__ }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    before = [dict(message) for message in MESSAGES]
    with pytest.raises(InvalidValueError, match=r"unsafe|undefined"):
        render(source)
    assert before == MESSAGES


def test_a_template_that_does_not_compile_is_the_models_fault() -> None:
    with pytest.raises(ModelFileError, match="line 2"):
        ChatTemplate("fine\n{% if %}", TOKENIZER)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content CONTENT }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("content", ["end", "<", "m", "_", "{", "", " ", "user", "Sure:\n1.", " end \n"])
def test_an_open_end_is_that_of_the_message_and_not_of_its_template(content: str) -> None:
    messages = [{"role": "user", "content": "end"}, {"role": "assistant", "content": content}]
    before = "<|im_start|>user\nend<|im_end|>\n<|im_start|>assistant\n"
    for source, end in (
        (CHATML.replace("CONTENT", ""), content),
        (CHATML.replace("CONTENT", "| trim"), content.strip()),
    ):
        assert cut_at_open_end(render(source, with_open_end(messages)), messages) == before + end
    assert messages[1]["content"] == content
    with pytest.raises(InvalidValueError, match="cannot be continued"):
        cut_at_open_end(render("{{ messages[0].content }}", with_open_end(messages)), messages)


def test_a_missing_template_says_how_to_give_one() -> None:
    error = missing_template("stories15m")
    assert error.param == "messages"
    assert "stories15m" in str(error)
    assert "--chat-template" in str(error)


def test_a_plain_message_is_one_text_with_a_role_templates_know() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert plain_message({"role": "developer", "content": parts, "name": "x"}) == {
        "role": "system",
        "content": "a\nb",
        "name": "x",
    }
    assert plain_message({"role": "assistant", "content": None})["content"] == ""
    for wrong in ("hi", {"content": "no role"}, {"role": "user", "content": 5}):
        with pytest.raises(InvalidValueError):
            plain_message(wrong)  # type: ignore[arg-type]
    for part in ("a", {"type": "image_url"}, {"type": "text", "text": 5}):
        with pytest.raises(UnsupportedParameterError, match="not supported: give text"):
            plain_message({"role": "user", "content": [part]})


@pytest.mark.parametrize(
    "source",
    [
        "{{ '%99999999d' % 1 }}",
        "{{ 'x' | center(99999999) }}",
        "{% if ('x' | center(99999999)) == 'y' %}{% endif %}",
        "{% set x = 'x' | center(99999999) | length %}",
        "{{ 'x' * 99999999 }}",
    ],
)
def test_nothing_is_computed_before_it_is_bounded(source: str) -> None:
    """Jinja computes what is constant when it compiles, where nobody counts."""
    tracemalloc.start()
    try:
        ChatTemplate(source, None)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
