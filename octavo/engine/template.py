"""Chat templates of served models are rendered in a process that can be killed (sandbox.py), never in the server's own:
`python -m octavo.engine.template`. What text/chat.py bounds by counting ends there; what it cannot is killed here.
"""

from functools import lru_cache
from typing import Any

from octavo.engine.sandbox import Sandbox, SandboxError, serve
from octavo.errors import InvalidValueError
from octavo.text.chat import MAX_SECONDS, ChatTemplate

MAX_WAITING = 4096  # requests; one takes less than a millisecond
MAX_BYTES = 1 << 29  # of the process; the largest body takes half of it
KILL_SECONDS = MAX_SECONDS + 1.0


class TemplateRenderer:
    """Renders in a process of its own."""

    def __init__(self) -> None:
        self._sandbox = Sandbox("octavo.engine.template", seconds=KILL_SECONDS, max_waiting=MAX_WAITING)
        self.start, self.close = self._sandbox.start, self._sandbox.close

    async def render(self, template: ChatTemplate, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """As ChatTemplate.render. Raises QueueFullError, too: too many wait for theirs."""
        try:
            return str(await self._sandbox.ask([template.source, messages, {**template.special_tokens, **variables}]))
        except SandboxError as error:
            raise InvalidValueError(f"the chat template refused the messages: {error}", param="messages") from error


@lru_cache(maxsize=1)
def _compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source, None)


def _render(question: Any) -> str:
    source, messages, variables = question
    return _compiled(source).run(messages, variables)


if __name__ == "__main__":
    serve(_render, max_bytes=MAX_BYTES)
