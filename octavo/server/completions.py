"""POST /v1/completions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from octavo.outputs import CompletionOutput
from octavo.server.answer import Answer
from octavo.server.chunks import ChunkWriter
from octavo.server.front import Caller, Front
from octavo.server.generation import Generation
from octavo.server.logprobs import LogprobsWriter, prompt_shape
from octavo.server.protocol import CompletionRequest, one_by_one

DEFAULT_MAX_TOKENS = 16


class Completion(Generation):
    """Completions of one or more prompts. `echoes` are their texts where `echo` asks for them, else empty."""

    object = chunk_object = "text_completion"
    is_chat = False
    body: CompletionRequest
    echoes: list[str]

    def choice(self, number: int, output: CompletionOutput) -> dict[str, Any]:
        """The text, behind its prompt if that is echoed."""
        choice: dict[str, Any] = {"text": self.echoes[number] + output.text}
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = self.prompts[number]
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_shape(self.told[number] or ())
        return choice

    def opening(self, writer: ChunkWriter, number: int) -> list[bytes]:
        """The echoed prompt and its ids, if asked for."""
        if not self.echoes[number] and not self.body.return_token_ids:
            return []
        fields: dict[str, Any] = {"prompt_token_ids": self.prompts[number]} if self.body.return_token_ids else {}
        parts = []
        for index in range(number * self.n, (number + 1) * self.n):
            if self.writers and self.body.echo:
                fields["logprobs"] = self.writers[index].lists(self.prompts[number], self.told[number] or ())
            parts.append(writer.choice(index, self.echoes[number], **fields))
        return parts

    def shape(self, writer: LogprobsWriter, number: int, output: CompletionOutput) -> dict[str, Any]:
        """Four parallel lists, which begin with an echoed prompt; in a stream its chunk has told that part."""
        is_begun = not self.body.echo or self.body.stream
        ids, logprobs = ([], ()) if is_begun else (self.prompts[number], self.told[number] or ())
        return writer.lists([*ids, *output.token_ids], [*logprobs, *(output.logprobs or ())])


async def complete(front: Front, body: CompletionRequest, caller: Caller) -> Answer:
    """Checks a completion request and begins to answer it. max_tokens defaults to 16, as OpenAI's."""
    front.model(body.model)
    texts = one_by_one(body.prompt)
    special = body.add_special_tokens
    prompts = [await front.prompt_ids(prompt, body, add_special_tokens=special, param="prompt") for prompt in texts]
    longest = max(map(len, prompts))
    max_tokens = front.max_tokens(longest, body.max_tokens, default=DEFAULT_MAX_TOKENS, param="prompt")
    params = front.sampling_params(body, max_tokens=max_tokens, logprobs=body.logprobs)
    if body.echo and params.prompt_logprobs is None:
        params = replace(params, prompt_logprobs=body.logprobs)
    job = Completion(front, caller, body, prompts, params, f"cmpl-{body.request_id or caller.request_id}")
    shown = texts if body.echo else [""] * len(texts)
    job.echoes = [text if isinstance(text, str) else front.tokenizer.decode(text) for text in shown]
    return job.answer()
