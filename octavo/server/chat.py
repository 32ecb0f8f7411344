"""POST /v1/chat/completions."""

from dataclasses import replace
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from octavo.errors import InvalidValueError, UnsupportedParameterError
from octavo.outputs import CompletionOutput
from octavo.server import call_grammar
from octavo.server.answer import Answer
from octavo.server.chunks import ChunkWriter
from octavo.server.front import Caller, Front
from octavo.server.generation import Generation
from octavo.server.logprobs import LogprobsWriter, prompt_shape
from octavo.server.protocol import ChatRequest, NamedTool
from octavo.server.tools import REQUIRED, THINK, UNTHINK, Calls, Delta, Form, Message, Reasoning, whole_message


class Chat(Generation):
    """A chat: the messages were rendered and tokenised into one prompt."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    is_chat = True

    def choice(self, number: int, output: CompletionOutput) -> dict[str, Any]:
        """The assistant's message."""
        if self.messages is None:
            return {"message": {"role": "assistant", "content": output.text, "refusal": None}}
        message = self.messages[number * self.n + output.index]
        return {"message": whole_message(message.feed(output.text, last=True))}

    def top(self) -> dict[str, Any]:
        """vLLM puts what is told of the prompt here."""
        told = self.told.get(0) if self.body.prompt_logprobs is not None else None
        return {} if told is None else {"prompt_logprobs": prompt_shape(told)}

    def opening(self, writer: ChunkWriter, number: int) -> list[bytes]:
        """Every choice begins with its role."""
        top = {"prompt_token_ids": self.prompts[number]} if self.body.return_token_ids else {}
        delta = {"role": "assistant", "content": ""}
        return [
            writer.chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, **top)
            for index in range(self.params.n)
        ]

    def shape(self, writer: LogprobsWriter, number: int, output: CompletionOutput) -> dict[str, Any]:
        """A list of objects."""
        return writer.chat(output)

    def deltas(self, answer: CompletionOutput) -> list[Delta]:
        """What some more of the one answer adds to its message."""
        if self.messages is not None:
            return self.messages[0].feed(answer.text, last=answer.finish_reason is not None)
        return [{"content": answer.text}] if answer.text else []


Job = TypeVar("Job", bound=Chat)


async def chat(front: Front, body: ChatRequest, caller: Caller) -> Answer:
    """Checks a chat request and begins to answer it."""
    return (await prepare(Chat, front, body, caller, "chatcmpl-")).answer()


async def prepare(kind: type[Job], front: Front, body: ChatRequest, caller: Caller, prefix: str) -> Job:
    """A checked chat of some kind; its id begins with `prefix`. max_tokens defaults to the rest of the context."""
    front.model(body.model)
    text = await front.render(body)
    asked = body.max_completion_tokens or body.max_tokens
    ids = await front.prompt_ids(text, body, "messages", room=asked or 1)
    max_tokens = front.max_tokens(len(ids), asked, default=None, param="messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = front.sampling_params(body, max_tokens=max_tokens, logprobs=logprobs)
    form = _form(front, body)
    opened = front.reasoning_parser == "deepseek_r1"
    if body.max_thinking_tokens and front.reasoning_parser is None:
        raise UnsupportedParameterError("a limit of thoughts needs --reasoning-parser", param="max_thinking_tokens")
    if body.max_thinking_tokens is not None and front.reasoning_parser is not None:
        marks = ("" if opened else THINK, UNTHINK)
        params = replace(params, max_thinking_tokens=body.max_thinking_tokens, thinking_marks=marks)
    forced = call_grammar.forced(body)
    if (structure := forced or call_grammar.strict(front, body, form)) is not None:
        params = replace(params, structured_outputs=structure)
    if form and form.needs_special_tokens:
        params = replace(params, skip_special_tokens=False)
    job = kind(front, caller, body, [ids], params, f"{prefix}{body.request_id or caller.request_id}")
    if form or front.reasoning_parser:
        shown = body.include_reasoning
        job.messages = [
            Message(
                Reasoning(opened=opened, shown=shown) if front.reasoning_parser and forced is None else None,
                Calls(form) if form else None,
                single=body.parallel_tool_calls is False,
            )
            for _ in range(job.num_choices)
        ]
        job.is_named = isinstance(body.tool_choice, NamedTool)
    return job


def chat_request(fields: dict[str, Any]) -> ChatRequest:
    """The chat that another API's request means. Raises RequestValidationError for what its fields did not tell."""
    try:
        return ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error


def _form(front: Front, body: ChatRequest) -> Form | None:
    """How calls will be written: as the grammar says where one must be made, else as the model was taught."""
    if isinstance(body.tool_choice, NamedTool):
        return Form(openings=("{",), head=r"(?=\{)", named=body.tool_choice.function.name)
    if body.tool_choice == "required":
        return REQUIRED
    if not body.tools or body.tool_choice == "none":
        return None
    if front.tool_form is None:
        raise InvalidValueError(
            "this server does not know how the model writes calls: start it with --tool-call-parser, or send "
            "tool_choice required or none",
            param="tools",
        )
    return front.tool_form
