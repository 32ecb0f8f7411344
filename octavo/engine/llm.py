"""The offline entrance: `LLM(model).generate(prompts, params)`, in the caller's process. Names and shapes are vLLM's.

The same frontend and engine core as the server's; messages are handed over unencoded.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from octavo.config import EngineConfig
from octavo.engine.calibrate import prepare
from octavo.engine.core import EngineCore
from octavo.engine.frontend import Frontend, Prompt
from octavo.engine.grammar import compile_here
from octavo.engine.groups import Group
from octavo.engine.vectors import cosine, vector_of
from octavo.errors import ConfigError, InvalidValueError, StepError
from octavo.executor.local import LocalExecutor
from octavo.messages import AbortRequests
from octavo.models.hub import resolve_model_of
from octavo.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from octavo.sampling_params import BeamSearchParams, Pooling, PoolingParams, RequestOutputKind, SamplingParams
from octavo.text.chat import ChatTemplate, cut_at_open_end, plain_message, with_open_end
from octavo.text.load import load_text
from octavo.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Item = TypeVar("Item")
TextAndIds = tuple[str | None, list[int]]


class LLM:
    """A model, loaded, that answers batches of prompts.

    Keyword arguments are the fields of `EngineConfig` (dtype, max_model_len, max_num_seqs, ...). Calls from several
    threads are answered one after the other: one call with many prompts is faster.

    Raises ConfigError, ModelError or MemoryPlanError when it cannot be built; each says what to do next.
    """

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        if model is not None:
            kwargs["model"] = model
        config = EngineConfig.from_kwargs(**kwargs)
        files = resolve_model_of(config)
        self._executor = LocalExecutor(config, files)
        start = self._executor.start()
        self.core = EngineCore(config, self._executor, start, tokenizer=lambda: self._text.tokenizer)
        prepare(self.core)
        self.config = config
        self._text = load_text(config, files)
        spec = self.core.info.spec
        self._frontend = Frontend(self._text.tokenizer, spec.vocab_size, config, max_model_len=spec.max_model_len)
        self._numbers = itertools.count()  # of requests, as vLLM's
        self._turn = threading.Lock()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: Sequence[Sequence[int]] | Sequence[int] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts, in order. A prompt is a string or `{"prompt_token_ids": [...]}` or `{"prompt": "..."}`.

        Args:
            prompts: one or many.
            sampling_params: one for all, or one per prompt; default: what the model recommends.
            prompt_token_ids: instead of prompts (the older vLLM spelling).
            use_tqdm: show a progress bar with tokens per second.
            priority: one per prompt, lower first; needs scheduling_policy="priority".

        Raises:
            RequestError: a prompt or its parameters are wrong; nothing was started.
            StepError: the engine failed on a request even when it was retried alone.
        """
        todo = _prompt_list(prompts, prompt_token_ids)
        params = self._params_list(sampling_params, len(todo))
        tokenized = [self._frontend.tokenize(prompt) for prompt in todo]
        return self._run(tokenized, params, use_tqdm, self._priorities(priority, len(todo)))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or many: renders the model's chat template, then generates.

        Args:
            messages: one conversation, or a list of them.
            sampling_params, use_tqdm: as for `generate`.
            chat_template: Jinja source, instead of the model's own.
            add_generation_prompt: end the prompt with the beginning of an answer.
            continue_final_message: let the model go on with the last message; needs add_generation_prompt=False.
            tools: shown to the template; answers are not parsed for calls.
            chat_template_kwargs: further variables for the template.

        Raises:
            RequestError: messages or parameters are wrong; nothing was started.
            StepError: the engine failed on a request even when it was retried alone.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidValueError(
                "continue_final_message needs add_generation_prompt=False", param="continue_final_message"
            )
        conversations = _conversations(messages)
        template = self._template(chat_template)
        variables = {**(chat_template_kwargs or {}), "tools": tools, "add_generation_prompt": add_generation_prompt}
        asked = [with_open_end(one) for one in conversations] if continue_final_message else conversations
        texts = [template.render(conversation, **variables) for conversation in asked]
        if continue_final_message:
            texts = [cut_at_open_end(*pair) for pair in zip(texts, conversations, strict=True)]
        params = self._params_list(sampling_params, len(texts))
        tokenizer = self.get_tokenizer()
        # the template writes the special tokens itself: none may be added
        tokenized: list[TextAndIds] = [(t, tokenizer.encode(t, add_special_tokens=False)) for t in texts]
        return self._run(tokenized, params, use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool | Callable[..., Any] = False
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt, best first by log probability over length ** length_penalty.

        Raises:
            RequestError: a prompt or the parameters are wrong; nothing was started.
            StepError: the engine failed on a request even when it was retried alone.
        """
        _check("params", params, BeamSearchParams)
        outputs = self.generate(prompts, params.as_sampling(), use_tqdm=use_tqdm)
        return [BeamSearchOutput([self._beam(output, answer) for answer in output.outputs]) for output in outputs]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, made of the model's last states.

        Raises:
            RequestError: a prompt is wrong; nothing was started.
            StepError: the engine failed on a request even when it was retried alone.
        """
        params = pooling_params or PoolingParams()
        _check("pooling_params", params, PoolingParams)
        todo = [self._frontend.tokenize(prompt) for prompt in _prompt_list(prompts, None)]
        outputs = self._run(todo, [params.as_sampling()] * len(todo), use_tqdm, pooling=params.pooling)
        vectors = [EmbeddingOutput(vector_of(output, normalize=params.normalize).tolist()) for output in outputs]
        return [
            EmbeddingRequestOutput(o.request_id, v, o.prompt_token_ids) for o, v in zip(outputs, vectors, strict=True)
        ]

    def score(
        self,
        data_1: Prompt | Sequence[Prompt],
        data_2: Prompt | Sequence[Prompt],
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | None = None,
    ) -> list[ScoringRequestOutput]:
        """How alike texts are, in pairs, or one with each of many: the cosines of their vectors.

        Raises as embed() does, and InvalidValueError where the numbers of texts do not match.
        """
        ones, others = _prompt_list(data_1, None), _prompt_list(data_2, None)
        if len(ones) not in (1, len(others)):
            raise InvalidValueError(f"{len(ones)} texts cannot be paired with {len(others)}", param="data_1")
        params = replace(pooling_params or PoolingParams(), normalize=True)
        firsts = self.embed([*ones, *others], params, use_tqdm)
        seconds = firsts[len(ones) :]
        scores = []
        for one, other in zip(firsts if len(ones) > 1 else firsts[:1] * len(others), seconds, strict=False):
            score = ScoringOutput(cosine(one.outputs.embedding, other.outputs.embedding))
            ids = one.prompt_token_ids + other.prompt_token_ids
            scores.append(ScoringRequestOutput(other.request_id, score, ids))
        return scores

    def _beam(self, output: RequestOutput, answer: CompletionOutput) -> BeamSearchSequence:
        ids = output.prompt_token_ids + answer.token_ids
        text = self._text.tokenizer.decode(ids) if self._text.tokenizer is not None else None
        told, logprob = answer.logprobs or [], answer.cumulative_logprob or 0.0
        return BeamSearchSequence(ids, told, logprob, text, answer.finish_reason, answer.stop_reason)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends; plain defaults where it has none."""
        recommended: dict[str, Any] = self.core.info.spec.generation_defaults
        return SamplingParams(**recommended)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ConfigError when the engine runs without one."""
        if self._text.tokenizer is None:
            raise ConfigError("this engine runs without a tokenizer (skip_tokenizer_init, or a bare config.json)")
        return self._text.tokenizer

    def start_profile(self) -> None:
        """Times every node of the steps from now on. Raises UnsupportedError on the reference runtime."""
        self._executor.worker.runtime.start_profile()

    def stop_profile(self) -> str:
        """Ends start_profile(); tables of what the nodes took, as a share of what the machine can do."""
        return self._executor.worker.runtime.stop_profile().describe()

    def close(self) -> None:
        """Frees weights, KV and threads."""
        self.core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _params_list(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(params, SamplingParams):
            return [params] * count
        return _one_each("sampling_params", params, count, SamplingParams)

    def _priorities(self, priority: Sequence[int] | None, count: int) -> list[int]:
        if priority is None:
            return [0] * count
        if self.config.scheduling_policy != "priority":
            raise InvalidValueError('priority needs scheduling_policy="priority"', param="priority")
        return _one_each("priority", priority, count, int)

    def _template(self, source: str | None) -> ChatTemplate:
        if source is not None:
            return ChatTemplate(source, self.get_tokenizer())
        if self._text.chat_template is None:
            raise InvalidValueError("this model has no chat template: pass chat_template=", param="messages")
        return self._text.chat_template

    def _run(
        self,
        tokenized: list[TextAndIds],
        params: list[SamplingParams],
        use_tqdm: bool | Callable[..., Any],
        priorities: Sequence[int] = (),
        pooling: Pooling | None = None,
    ) -> list[RequestOutput]:
        groups: list[Group] = []
        requests = []
        with self._turn:
            try:
                for (text, ids), p, priority in zip(tokenized, params, priorities or [0] * len(params), strict=True):
                    wanted = replace(p, output_kind=RequestOutputKind.FINAL_ONLY)
                    grammar = compile_here(p.structured_outputs) if p.structured_outputs else None
                    number = str(next(self._numbers))
                    group, added = self._frontend.add(
                        number, text, ids, wanted, priority=priority, grammar=grammar, pooling=pooling
                    )
                    groups.append(group)
                    requests.extend(added)
                for request in requests:
                    self.core.handle(request)
                return self._collect(groups, use_tqdm)
            except BaseException:  # Ctrl-C too: what was started must not run on in the next call
                self._abandon(groups)
                raise

    def _collect(self, groups: list[Group], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        done: dict[str, RequestOutput] = {}
        with _Progress(len(groups), use_tqdm) as progress:
            while len(done) < len(groups):
                updates, finishes, arrivals = self._frontend.process(self.core.step().deltas)
                for finish in finishes:
                    self.core.handle(finish)
                for update in updates:
                    if update.group.error:
                        raise _named(update.group.error, update.group.request_id)
                    if update.output is not None:
                        done[update.group.request_id] = update.output
                        progress.finished(update.output)
                progress.tokens(sum(count * times for (*_, count), times in arrivals.items()))
        return [done[group.request_id] for group in groups]

    def _abandon(self, groups: Iterable[Group]) -> None:
        running = [request_id for group in groups for request_id in self._frontend.abort(group)]
        self.core.handle(AbortRequests(running))
        while self.core.has_work:
            self.core.step()


def _check(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise InvalidValueError(f"{name} must be {kind.__name__}, not {value!r:.60}", param=name)


def _one_each(name: str, values: Sequence[Item], count: int, kind: type) -> list[Item]:
    _check(name, values, Sequence)
    for value in values:
        _check(name, value, kind)
    if len(values) != count:
        raise InvalidValueError(f"{count} prompts, but {len(values)} of {name}", param=name)
    return list(values)


def _named(error: Exception, request_id: str) -> Exception:
    """The error of one of many requests says which."""
    return StepError(f"request {request_id} failed: {error}") if isinstance(error, StepError) else error


class _Progress:
    """A bar that counts requests and shows tokens per second."""

    def __init__(self, total: int, use_tqdm: bool | Callable[..., Any]) -> None:
        self._bar = None
        self._in = self._out = 0
        if use_tqdm:
            from tqdm.auto import tqdm

            make = use_tqdm if callable(use_tqdm) else tqdm
            self._bar = make(total=total, desc="Generating", unit="req", dynamic_ncols=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def tokens(self, count: int) -> None:
        self._out += count
        if self._bar is not None and count:
            past = self._bar.format_dict["elapsed"] or 1e-9
            self._bar.set_postfix_str(f"in {self._in / past:.0f}, out {self._out / past:.0f} tok/s", refresh=False)
            self._bar.update(0)

    def finished(self, output: RequestOutput) -> None:
        self._in += len(output.prompt_token_ids)
        if self._bar is not None:
            self._bar.update(1)


def _prompt_list(prompts: Prompt | Sequence[Prompt] | None, ids: Any) -> list[Prompt]:
    if (prompts is None) == (ids is None):
        raise InvalidValueError("give either prompts or prompt_token_ids", param="prompts")
    if ids is not None:
        many = isinstance(ids, Sequence) and bool(ids) and not isinstance(ids[0], int)
        return [{"prompt_token_ids": [*p] if isinstance(p, Sequence) else p} for p in (ids if many else [ids])]
    assert prompts is not None
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Sequence):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [{"prompt_token_ids": list(prompts)}]
    return list(prompts)  # type: ignore[arg-type]


def _conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[list[dict[str, Any]]]:
    """One conversation or many as many, their messages as templates know them."""
    _check("messages", messages, Sequence)
    many: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
    if not all(many):
        raise InvalidValueError("a conversation is empty: give at least one message", param="messages")
    return [[plain_message(message) for message in conversation] for conversation in many]
