"""Chat templates of servers are rendered in a process that can be killed; the prompts are those of this process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time

import pytest

from octavo.engine.template import TemplateRenderer
from octavo.errors import InvalidValueError
from octavo.text import chat
from octavo.text.chat import ChatTemplate

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{{ mood }}"
)
MESSAGES = [{"role": "user", "content": "Grüß Gott \N{WAVING HAND SIGN}\n\ud800"}, {"role": "assistant", "content": ""}]


class Tokenizer:
    def __init__(self):
        self.special_tokens = {"bos_token": "<s>"}


def with_renderer(use):
    async def body():
        renderer = TemplateRenderer()
        try:
            return await use(renderer)
        finally:
            await renderer.close()

    return asyncio.run(asyncio.wait_for(body(), 60))


def test_prompts_are_those_of_this_process() -> None:
    template = ChatTemplate(CHATML, Tokenizer())
    cases = [{}, {"tools": [{"name": "x"}]}, {"add_generation_prompt": False}, {"mood": "\N{SNOWMAN}"}]

    async def use(renderer):
        await renderer.start()
        process = renderer._sandbox._process
        process.send_signal(signal.SIGINT)  # from a terminal, to each process of the group, while it still imports
        rendered = []
        for case in cases:
            variables = {"tools": None, "add_generation_prompt": True, **case}
            rendered.append(await renderer.render(template, MESSAGES, variables))
        other = await renderer.render(ChatTemplate("other", None), MESSAGES, {})
        assert renderer._sandbox._process is process
        return rendered, other

    assert with_renderer(use) == ([template.render(MESSAGES, **case) for case in cases], "other")


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe|not safe|SecurityError"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{{ '%999999999d' % 1 }}{{ '%999999999d' % 1 }}", "MemoryError|too large|longer"),
        ("{{ '{:>2000000000}'.format(1) }}", "MemoryError|too large|larger"),
    ],
)
def test_what_a_template_may_not_do_ends_its_request_alone(source: str, word: str) -> None:
    async def use(renderer):
        with pytest.raises(InvalidValueError, match=f"refused the messages: .*({word})"):
            await renderer.render(ChatTemplate(source, None), MESSAGES, {})
        assert await renderer.render(ChatTemplate("fine", None), MESSAGES, {}) == "fine"

    with_renderer(use)


def test_a_system_that_limits_no_address_space_renders_all_the_same() -> None:
    """macOS: setrlimit() of it is an error."""
    code = (
        "import resource\n"
        "def refuse(limit, most): raise ValueError('current limit exceeds maximum limit')\n"
        "resource.setrlimit = refuse\n"
        "from octavo.engine import sandbox, template\n"
        "sandbox.serve(template._render, max_bytes=template.MAX_BYTES)\n"
    )
    question = json.dumps([7, ["{{ messages[0].content }}!", [{"role": "user", "content": "Hi"}], {}]]) + "\n"
    done = subprocess.run([sys.executable, "-c", code], input=question, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {"number": 7, "answer": "Hi!"}, done.stderr


def test_one_call_that_takes_for_ever_is_killed() -> None:
    """One built-in call, which looks at no clock; here it is the whole process that stands still."""
    slow = ChatTemplate("{{ messages | string }}", None)

    async def use(renderer):
        assert await renderer.render(ChatTemplate("fine", None), MESSAGES, {}) == "fine"
        first = renderer._sandbox._process
        first.send_signal(signal.SIGSTOP)  # as slow as can be
        renderer._sandbox._seconds = 0.3
        began = time.monotonic()
        with pytest.raises(InvalidValueError, match=r"took longer than 0\.3 s"):
            await renderer.render(slow, MESSAGES, {})
        assert time.monotonic() - began < 20
        renderer._sandbox._seconds = 20
        assert await renderer.render(ChatTemplate("fine", None), MESSAGES, {}) == "fine"
        assert renderer._sandbox._process is not first

    with_renderer(use)


def test_messages_that_nest_too_deeply_are_refused() -> None:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]

    async def use(renderer):
        with pytest.raises(InvalidValueError, match="nested too deeply"):
            await renderer.render(ChatTemplate("fine", None), [{"content": nested}], {})

    with_renderer(use)
    while nested:  # freed level by level: freed at once it would recurse
        nested = nested.pop()


def test_a_process_is_given_longer_than_the_template_gives_itself() -> None:
    assert TemplateRenderer()._sandbox._seconds > chat.MAX_SECONDS
