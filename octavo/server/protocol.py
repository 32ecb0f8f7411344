"""What a client may send: OpenAI's request bodies with vLLM's extras, as strict and bounded pydantic models.

A field is honoured, or refused with 400 naming it; none is swallowed. Known fields that are not built stand in the
`refused` table of their model with the values that ask for nothing (null always is one). "1" is not 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from octavo import sampling_params as limits
from octavo.errors import InvalidValueError, UnsupportedParameterError
from octavo.sampling_params import StructuredOutputsParams

MAX_TEXT = 1 << 24  # characters; the body limit binds first
MAX_PROMPT_TOKENS = 1 << 24
MAX_PROMPTS = 2048
MAX_CHOICES = 1024  # prompts x n of one request
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TEMPLATE_KWARGS = 32
MAX_NAME = 64  # characters of a field whose like is looked for
MAX_TOOLS = 128
REQUEST_ID = r"^[A-Za-z0-9._-]{1,128}$"


def _bounded(value: dict[str, Any]) -> dict[str, Any]:
    if limits.is_too_large(value):
        raise InvalidValueError(f"at most {limits.MAX_GRAMMAR} characters and {limits.MAX_NESTING} levels are taken")
    return value


def _within(name: str) -> Any:
    """The bounds of a number of SamplingParams."""
    low, high = limits.BOUNDS[name]
    return Field(ge=low, le=high)


Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", max_length=64)]
GrammarText = Annotated[str, Field(min_length=1, max_length=limits.MAX_GRAMMAR)]
JsonSchema = Annotated[dict[str, Any], Field(max_length=1024), AfterValidator(_bounded)]
Count = Annotated[int, _within("max_tokens")]
Temperature = Annotated[float, _within("temperature")]
TopP = Annotated[float, Field(gt=0, le=limits.BOUNDS["top_p"][1])]
NumLogprobs = Annotated[int, _within("logprobs")]
StopString = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_LENGTH)]
BiasKey = Annotated[str, Field(max_length=10, pattern=r"^(0|[1-9][0-9]{0,9})$")]  # one spelling a token
BiasValue = Annotated[float, Field(ge=-100, le=100)]

UNBUILT_SAMPLING: dict[str, tuple[object, ...]] = {
    "spaces_between_special_tokens": (True,),
    "logits_processors": ([],),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}
_INSTEAD = dict.fromkeys(("store", "metadata"), "nothing is kept of a completion: leave it out, or use /v1/responses")
UNBUILT_CHAT: dict[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "echo": (False,),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "documents": ([],),
    "chat_template": (),  # a template is code: it comes with the model or from the operator
    "mm_processor_kwargs": ({},),
}


class Strict(BaseModel):
    """Base of every body: strict types, no unknown fields, refused fields by name."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            neutral = cls.refused.get(name)
            if neutral is None:
                kept[name] = value
            elif value is not None and not any(_same(value, other) for other in neutral):
                why = _INSTEAD.get(name, f"{name} is not supported here: leave it out")
                raise UnsupportedParameterError(why, param=name)
        unknown = next(
            (name for name in kept if name not in cls.model_fields), None
        )  # one: looking for its like is slow
        if unknown is not None and len(unknown) <= MAX_NAME:
            known = [field.alias or name for name, field in cls.model_fields.items()]
            close = get_close_matches(unknown, known, 1, cutoff=0.8)
            if close and close[0] != unknown:
                why = f"{unknown} is not a parameter of this server: did you mean {close[0]}?"
                raise UnsupportedParameterError(why, param=unknown)
        return kept


def goes_with(name: str, *, type: str) -> Any:
    """A validator of a model with a `type`: the field is given with this one, and with no other."""

    def check(body: Any) -> Any:
        if (body.type == type) != (getattr(body, name) is not None):
            raise InvalidValueError(f"{name} goes with type {type}, and with no other", param=name)
        return body

    return model_validator(mode="after")(check)


class TextPart(Strict):
    """One text part of a message's content."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str) and kind != "text":
            raise UnsupportedParameterError(
                f"content parts of type {kind[:40]!r} are not supported: send text", param="type"
            )
        return data


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "<string>"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "<lists of ids>"
    return "<strings>" if isinstance(first, str) else "<ids>"


def _scalar_kind(value: object) -> str:
    """What is no scalar is held against a string, and refused as such."""
    kinds = {bool: "<bool>", int: "<int>", float: "<float>", type(None): "<null>"}
    return kinds.get(type(value), "<string>")


String = TypeVar("String")
Other = TypeVar("Other")
StringOrList = Annotated[
    Annotated[String, Tag("<string>")] | Annotated[Other, Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<string>"),
]
WordOrObject = Annotated[
    Annotated[String, Tag("<string>")] | Annotated[Other, Tag("<object>")],
    Discriminator(lambda value: "<string>" if isinstance(value, str) else "<object>"),
]
Content = StringOrList[Text, Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]]
Stop = StringOrList[StopString, Annotated[list[StopString], Field(max_length=limits.MAX_STOP)]]
Prompt = Annotated[
    Annotated[Text, Tag("<string>")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<strings>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<lists of ids>")],
    Discriminator(_prompt_kind),
]
TemplateValue = Annotated[
    Annotated[bool, Tag("<bool>")]
    | Annotated[int, Field(ge=-(1 << 53), le=1 << 53), Tag("<int>")]
    | Annotated[float, Field(ge=-1e300, le=1e300), Tag("<float>")]
    | Annotated[None, Tag("<null>")]
    | Annotated[Name, Tag("<string>")],
    Discriminator(_scalar_kind),
]
TemplateKwargs = Annotated[dict[Name, TemplateValue], Field(max_length=MAX_TEMPLATE_KWARGS)]


ToolWord = Literal["none", "auto", "required"]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class Function(Strict):
    """A function that the model may call."""

    name: FunctionName
    description: Annotated[str, Field(max_length=1 << 16)] | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None  # calls that must be made follow the schema with or without it


class Tool(Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class FunctionReference(Strict):
    """A function by its name."""

    name: FunctionName


class NamedTool(Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionReference


class FunctionCall(Strict):
    """A call that the model made before."""

    name: FunctionName
    arguments: Text


class ToolCall(Strict):
    """The same under its id."""

    id: Name | None = None
    type: Literal["function"]
    function: FunctionCall
    index: Annotated[int, Field(ge=0, le=MAX_TOOLS)] | None = None


class Message(Strict):
    """One turn of a chat. "developer" is OpenAI's newer word for "system"."""

    refused = {"function_call": (), "audio": (), "refusal": (), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise InvalidValueError(f"a {self.role} message needs content", param="content")
        return self


class StreamOptions(Strict):
    """Options of a stream."""

    refused = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StreamOptions:
        if self.continuous_usage_stats and not self.include_usage:
            raise InvalidValueError("continuous_usage_stats needs include_usage=true", param="continuous_usage_stats")
        return self


class JsonSchemaFormat(Strict):
    """A JSON schema under a name. With or without `strict` the answer follows it."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer is: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    _consistent = goes_with("json_schema", type="json_schema")

    def structure(self) -> StructuredOutputsParams | None:
        """The same as the engine knows it."""
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.schema_, asked_as="response_format")
        return StructuredOutputsParams(json_object=True, asked_as="response_format") if self.type != "text" else None


class StructuredOutputs(Strict):
    """vLLM's way to say what the answer looks like: exactly one of these."""

    refused = {"structural_tag": (), "disable_any_whitespace": (False,), "whitespace_pattern": ()}

    json_: JsonSchema | GrammarText | None = Field(default=None, alias="json")
    regex: GrammarText | None = None
    choice: Annotated[list[Name], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None

    def structure(self) -> StructuredOutputsParams:
        """The same as the engine knows it. Raises InvalidValueError for none or several."""
        given = self.model_dump(exclude_none=True)
        return StructuredOutputsParams(**{name.rstrip("_"): value for name, value in given.items()})


class EngineRequest(Strict):
    """What everything that the engine runs has. Null means: the default."""

    model: Name | None = None
    add_special_tokens: bool = True
    request_id: Annotated[str, Field(max_length=128, pattern=REQUEST_ID)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_PROMPT_TOKENS)] | None = None  # the last ones are kept
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), le=(1 << 31) - 1)] | None = None  # lower runs first
    timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None  # seconds; then the request is ended with 408
    user: Annotated[str, Field(max_length=512)] | None = None  # whose share it uses, where no API key says


class GenerationRequest(EngineRequest):
    """What chat and completions share. Null means: the default."""

    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, _within("top_k")] | None = None
    min_p: Annotated[float, _within("min_p")] | None = None
    n: Annotated[int, _within("n")] | None = None
    use_beam_search: bool = False  # n is the width, or best_of where it is given
    length_penalty: Annotated[float, _within("length_penalty")] | None = None
    early_stopping: bool | Literal["never"] | None = None
    seed: Annotated[int, _within("seed")] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=limits.MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, _within("min_tokens")] = 0
    presence_penalty: Annotated[float, _within("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, _within("frequency_penalty")] | None = None
    repetition_penalty: Annotated[float, _within("repetition_penalty")] | None = None
    logit_bias: Annotated[dict[BiasKey, BiasValue], Field(max_length=limits.MAX_LOGIT_BIAS)] | None = None
    bad_words: Annotated[list[StopString], Field(max_length=limits.MAX_BAD_WORDS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=limits.MAX_ALLOWED_IDS)] | None = None
    prompt_logprobs: NumLogprobs | None = None  # not streamed
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool = True
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    def structure(self) -> StructuredOutputsParams | None:
        """What the answer must look like. Raises InvalidValueError for what cannot be."""
        formatted = self.response_format.structure() if self.response_format else None
        if formatted and self.structured_outputs:
            raise InvalidValueError("give response_format or structured_outputs, not both", param="response_format")
        return self.structured_outputs.structure() if self.structured_outputs else formatted

    @model_validator(mode="after")
    def _consistent_with_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidValueError("stream_options is only allowed with stream=true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidValueError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
        return self


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    refused = {**UNBUILT_SAMPLING, **UNBUILT_CHAT}

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: WordOrObject[ToolWord, NamedTool] | None = None  # default: auto with tools, none without
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    max_thinking_tokens: Annotated[int, _within("max_thinking_tokens")] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False  # a template writes its own
    chat_template_kwargs: TemplateKwargs | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidValueError("top_logprobs needs logprobs=true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidValueError("max_tokens and max_completion_tokens differ: give one", param="max_tokens")
        check_continuation(self)
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = {tool.function.name for tool in self.tools or ()}
        if len(names) < len(self.tools or ()):
            raise InvalidValueError("two tools have the same name", param="tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise InvalidValueError(
                f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools",
                param="tool_choice",
            )
        if self.tool_choice == "required" and not names:
            raise InvalidValueError("tool_choice required needs tools", param="tool_choice")


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    refused = {**UNBUILT_SAMPLING, "suffix": ("",)}

    prompt: Prompt
    best_of: Annotated[int, _within("best_of")] | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    max_tokens: Annotated[int, Field(ge=0, le=limits.MAX_TOKENS)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidValueError(
                "max_tokens 0 asks for the prompt alone: it goes with echo=true", param="max_tokens"
            )
        num_answers = max(self.n or 1, self.best_of or 1)
        if num_answers > (self.n or 1) and self.stream:
            raise InvalidValueError("best_of above n cannot be streamed: the best is known at the end", param="best_of")
        if self.best_of is not None and num_answers > self.best_of:
            raise InvalidValueError(f"best_of must be at least n ({num_answers}), not {self.best_of}", param="best_of")
        num_prompts = len(self.prompt) if _prompt_kind(self.prompt) in ("<strings>", "<lists of ids>") else 1
        if num_prompts * num_answers > MAX_CHOICES:
            raise InvalidValueError(
                f"prompts x n must be at most {MAX_CHOICES}, not {num_prompts * num_answers}", param="n"
            )
        return self


class TokenizeRequest(Strict):
    """Body of POST /tokenize: a prompt, or messages to put through the chat template."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None  # default: true for a prompt, false for messages
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: TemplateKwargs | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidValueError("give either prompt or messages", param="prompt")
        check_continuation(self)
        return self


class DetokenizeRequest(Strict):
    """Body of POST /detokenize."""

    model: Name | None = None
    tokens: TokenIds


def one_by_one(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a body: a string or a list of ids is one prompt."""
    if _prompt_kind(prompt) in ("<string>", "<ids>") or not prompt:
        return [cast("str | list[int]", prompt)]
    return cast("list[str | list[int]]", prompt)


def check_continuation(body: ChatRequest | TokenizeRequest) -> None:
    """An unfinished last message is continued, or a new one is begun: not both."""
    if body.continue_final_message and body.add_generation_prompt:
        raise InvalidValueError(
            "continue_final_message needs add_generation_prompt=false", param="continue_final_message"
        )


def _same(value: object, neutral: object) -> bool:
    """Equality of JSON values: true is not 1, but 1 is 1.0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
