"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from octavo.outputs import CompletionOutput
from octavo.server.answer import Answer
from octavo.server.chunks import ChunkWriter
from octavo.server.front import Caller, Front
from octavo.server.generation import Generation
from octavo.server.logprobs import LogprobsWriter
from octavo.server.protocol import ChatRequest


class Chat(Generation):
    """A chat: the messages were rendered and tokenised into one prompt."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    is_chat = True

    def choice(self, number: int, output: CompletionOutput) -> dict[str, Any]:
        """The assistant's message."""
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": output.text, "refusal": None}}
        return choice

    def opening(self, writer: ChunkWriter, number: int) -> list[bytes]:
        """Every choice begins with its role."""
        top = {"prompt_token_ids": self.prompts[number]} if self.body.return_token_ids else {}
        delta = {"role": "assistant", "content": ""}
        return [
            writer.chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, **top)
            for index in range(self.params.n)
        ]

    def shape(self, writer: LogprobsWriter, output: CompletionOutput) -> dict[str, Any]:
        """A list of objects."""
        return writer.chat(output)


async def chat(front: Front, body: ChatRequest, caller: Caller) -> Answer:
    """Checks a chat request and begins to answer it. max_tokens defaults to the rest of the context."""
    front.model(body.model)
    text = await front.render(body)
    ids = await front.prompt_ids(text, body, add_special_tokens=body.add_special_tokens, param="messages")
    asked = body.max_completion_tokens or body.max_tokens
    max_tokens = front.max_tokens(len(ids), asked, default=None, param="messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = front.sampling_params(body, max_tokens=max_tokens, logprobs=logprobs)
    return Chat(front, caller, body, [ids], params, f"chatcmpl-{body.request_id or caller.request_id}").answer()
