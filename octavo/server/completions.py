"""POST /v1/completions."""

from contextlib import aclosing
from dataclasses import replace
from typing import Any

from octavo.outputs import CompletionOutput
from octavo.server.answer import Answer, Outputs
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

    def _outputs(self) -> Outputs:
        outputs = super()._outputs()
        return _echoes(outputs) if self.body.max_tokens == 0 else outputs

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
    """Checks a completion request and begins to answer it. max_tokens defaults to 16, as OpenAI's; 0 is an echo."""
    front.model(body.model)
    texts = one_by_one(body.prompt)
    default = 1 if body.max_tokens == 0 else DEFAULT_MAX_TOKENS  # one is generated, and not shown
    room = body.max_tokens or default
    prompts = [await front.prompt_ids(prompt, body, "prompt", room=room) for prompt in texts]
    max_tokens = front.max_tokens(max(map(len, prompts)), body.max_tokens, default=default, param="prompt")
    params = front.sampling_params(body, max_tokens=max_tokens, logprobs=body.logprobs)
    if body.echo and params.prompt_logprobs is None:
        params = replace(params, prompt_logprobs=body.logprobs)
    job = Completion(front, caller, body, prompts, params, f"cmpl-{body.request_id or caller.request_id}")
    shown = texts if body.echo else [""] * len(texts)
    job.echoes = [text if isinstance(text, str) else front.tokenizer.decode(text) for text in shown]
    return job.answer()


async def _echoes(outputs: Outputs) -> Outputs:
    """Outputs without what was generated."""
    async with aclosing(outputs):
        async for number, output in outputs:
            output.num_generated = 0
            output.outputs = [CompletionOutput(o.index, "", [], None, [], "length") for o in output.outputs]
            yield number, output
