"""`octavo chat`: a conversation in the terminal, or a pipe of lines when stdin is none."""

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from octavo.cli import talk
from octavo.cli.files import read_stdin
from octavo.cli.flags import engine_flags
from octavo.cli.serve import find_model, read_template
from octavo.cli.talk import Answer, Message, Sampling, Talker
from octavo.cli.terminal import say, say_error
from octavo.config import EngineConfig
from octavo.errors import RequestError, ServerError

_HELP = """\
  /reset         forget the conversation
  /system TEXT   set the system prompt and forget the conversation; without TEXT, drop it
  /help          this list
  /exit          leave (so does Ctrl-D); Ctrl-C stops an answer"""

EXAMPLES = (
    "octavo chat                                 the default model, loaded here\n\n"
    "octavo chat --url http://127.0.0.1:8000     a server that runs\n\n"
    "echo 'Why is the sky blue?' | octavo chat   one question for each line of stdin"
)


@engine_flags(without=("served_model_name",))
def chat(
    config: EngineConfig,
    system: Annotated[str | None, Option(help="System prompt.", metavar="TEXT")] = None,
    max_tokens: Annotated[int | None, Option(help="Most tokens of an answer.", min=1, metavar="N")] = None,
    temperature: talk.TemperatureOption = None,
    top_p: talk.TopPOption = None,
    chat_template: Annotated[
        Path | None, Option(help="File with a Jinja chat template, instead of the model's own.", metavar="FILE")
    ] = None,
    url: talk.UrlOption = None,
    api_key: talk.ApiKeyOption = None,
) -> int:
    """Talk to a model, here or at a server. /help lists what can be typed.

    A pipe's lines are answered one by one; the exit status is 1 where one of them could not be.
    """
    sampling = Sampling(max_tokens, temperature, top_p)
    template = read_template(chat_template)
    if url is None:
        find_model(config)
    say(f"Asking {url}" if url else f"Loading {config.model} ...", style="dim")
    with asyncio.Runner() as runner:
        talker = runner.run(talk.open_talker(config, url, api_key, chats=True, chat_template=template))
        try:
            return Conversation(runner, talker, sampling, system).run()
        finally:
            runner.run(talker.close())


class Conversation:
    """The turns so far, and the loop that adds to them."""

    def __init__(self, runner: asyncio.Runner, talker: Talker, sampling: Sampling, system: str | None) -> None:
        self._runner = runner
        self._talker = talker
        self._sampling = sampling
        self._interactive = sys.stdin.isatty()
        self._system = system
        self._messages: list[Message] = []
        self._failed = False  # a turn
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system prompt."""
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def run(self) -> int:
        """Reads lines until /exit or the end of stdin; the exit status."""
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (line editing and history for input())
            say("Type a message. /help lists commands, Ctrl-D leaves.", style="dim")
        while (line := self._read_line()) is not None:
            line = line.strip()
            if line.startswith("/"):
                if not self.obey(line):
                    break
            elif line:
                self.ask(line)
        return 1 if self._failed and not self._interactive else 0

    def obey(self, line: str) -> bool:
        """Does what a command says; False means leave."""
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        if command == "/reset":
            self.reset()
            say("Forgotten.", style="dim")
        elif command == "/system":
            self._system = rest.strip() or None
            self.reset()
            say("System prompt set." if self._system else "No system prompt.", style="dim")
        else:
            if command != "/help":
                say(f"There is no {command}.", style="dim")
            say(_HELP, style="dim")
        return True

    def ask(self, text: str) -> None:
        """One turn. A refused or interrupted one leaves no trace but what was already said."""
        self._messages.append({"role": "user", "content": text})
        answer = Answer()
        try:
            self._runner.run(talk.show(self._talker.chat(self._messages, self._sampling, answer)))
        except (RequestError, ServerError) as error:
            self._messages.pop()
            self._failed = True
            say_error(f"{error}; /reset forgets the conversation")
            return
        except KeyboardInterrupt:
            answer.finish_reason = "abort"
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._messages.append({"role": "assistant", "content": answer.text})
        say(answer.summary() + (", stopped" if answer.finish_reason == "abort" else ""), style="dim")

    def _read_line(self) -> str | None:
        if not self._interactive:
            return read_stdin(sys.stdin.readline) or None
        try:
            return input("\n> ")
        except EOFError:
            say()
            return None
        except KeyboardInterrupt:
            say("\n(/exit or Ctrl-D leaves)", style="dim")
            return ""
