"""The engine for servers: its own process, one event loop in front. Streaming, abort, honest health.

When the process dies, or stalls and is killed, another one is started, and what was running goes on where it was: who
reads a stream sees a pause. After too many deaths in a row the engine is dead for good, and says so to everybody.

engine = await AsyncEngine.start(EngineConfig(model="smollm2"))
async for output in engine.generate("Hello", SamplingParams(max_tokens=8), "request-1"):
    ...
await engine.shutdown()
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import Any, Unpack

from octavo import errors, messages
from octavo.config import EngineConfig
from octavo.engine.black_box import MAX_STEPS, write_black_box
from octavo.engine.child import EngineProcess
from octavo.engine.frontend import Frontend, Prompt
from octavo.engine.grammar import GrammarCompiler
from octavo.engine.groups import Group, Update, tell_finished
from octavo.engine.outbox import Outbox, Relay
from octavo.engine.template import TemplateRenderer
from octavo.engine.watchdog import MAX_RESTARTS, RESTART_WINDOW, Progress, Restarts, Watchdog
from octavo.errors import EngineDeadError, EngineLoadingError, OctavoError, QueueFullError, TimeLimitError
from octavo.messages import AbortRequests, Admission, EngineFailed, EngineReady, Shutdown, StepOutputs, StepRecord
from octavo.models.hub import resolve_model_of
from octavo.models.spec import ModelFiles
from octavo.observe.metrics import Metrics
from octavo.outputs import RequestOutput
from octavo.request import FinishReason
from octavo.sampling_params import SamplingParams
from octavo.text.chat import ChatTemplate, missing_template
from octavo.text.load import load_text
from octavo.text.tokenizer import LONG_TEXT, Tokenizer

LOOK_SECONDS = 0.5  # between two looks at a working engine
MAP_SECONDS, MAP_TIMEOUT = 0.2, 10.0  # between two maps of its memory, and for one
STACK_SECONDS = 0.2  # for a stalled one to write where its threads stand
log = logging.getLogger("octavo.engine")


class AsyncEngine:
    """An engine process and the front half that talks to it. Make it with `start`.

    Attributes:
        config, ready: what was asked for, what the engine reported.
        tokenizer, chat_template: None where the engine takes token ids only.
        metrics: Prometheus metrics, fed from StepRecords and arrivals.
        dead: why the engine is gone for good, or None.
        restarting: why the last one went, while the next one loads; else None.
        timings: seconds by phase of the start; they add up to the whole.
    """

    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        self.config = config
        self.model_name = config.served_model_name or config.model
        self.dead: str | None = None
        self.restarting: str | None = None
        self.timings: dict[str, float] = {}
        self.ready: EngineReady
        self.tokenizer: Tokenizer | None
        self.chat_template: ChatTemplate | None
        self.metrics: Metrics
        self._files = files
        self._process: EngineProcess
        self._frontend: Frontend
        self._outboxes: dict[int, Outbox] = {}
        self._watchdog = Watchdog(config.max_num_batched_tokens, config.threads())
        self._restarts = Restarts()
        self._last_steps: deque[StepRecord] = deque(maxlen=MAX_STEPS)
        self._black_box = ""  # where that of a stalled engine is
        self._grammars = GrammarCompiler()
        self._templates = TemplateRenderer()
        self._tasks: list[asyncio.Task[None]] = []
        self._map: asyncio.Future[dict[str, Any]] | None = None
        self._mapped_at = 0.0

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        chat_template: str | None = None,
        metrics_compat: str = "octavo",
        process: EngineProcess | None = None,
    ) -> AsyncEngine:
        """Finds the model, has an engine process load it (`process`, where one does that already), loads the text half
        meanwhile, returns when both are ready.

        Raises what the model or the config deserve: ModelError, ConfigError, MemoryPlanError, EngineDeadError.
        """
        began = time.monotonic()
        files = resolve_model_of(config)
        engine = cls(config, files)
        engine.timings["find model"] = time.monotonic() - began
        if process is None:
            process = EngineProcess()
            process.load(config, files)
        engine._process = process
        try:
            await process.open()
            await engine._load_front(chat_template)
            engine._take_ready(await engine._await_ready(), metrics_compat)
        except BaseException:
            await engine._process.end()
            raise
        whole = time.monotonic() - process.told_at
        engine.timings.update(engine.ready.timings)
        engine.timings["process start, imports"] = max(0.0, whole - sum(engine.ready.timings.values()))
        engine._tasks = [asyncio.create_task(engine._supervise()), asyncio.create_task(engine._watch())]
        if engine.chat_template is not None:
            engine._tasks.append(asyncio.create_task(engine._templates.start()))
        return engine

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self.ready.max_model_len

    async def tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Text and checked ids of a prompt; a long text is tokenised off the event loop."""
        if isinstance(prompt, str) and len(prompt) >= LONG_TEXT:
            return await asyncio.to_thread(self._frontend.tokenize, prompt)
        return self._frontend.tokenize(prompt)

    async def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The prompt for messages, as ChatTemplate.render makes it, in a process that can be killed.

        Raises InvalidValueError: the model has no template, or that refused. QueueFullError: too many wait.
        """
        if self.chat_template is None:
            raise missing_template(self.model_name)
        return await self._templates.render(self.chat_template, messages, variables)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        on_tokens: Callable[[int], None] | None = None,
        relay: Relay | None = None,
        **how: Unpack[Admission],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Streams the answer; `params.output_kind` decides whether outputs are cumulative, deltas, or one at the end.

        Args:
            prompt, params, request_id: as in vLLM.
            on_tokens: hears how many tokens a step brought, whoever takes them and however the request ends.
            relay: is shown what comes of answers that go on while the iterator is waited for; True: it has taken that.
            priority: lower is admitted first, under the policy `priority`.
            cache_salt: only requests with the same one share cached prefixes.
            tenant, weight: whose share it uses, and how large that is, under the policy `fair`.
            timeout: seconds after which the request is ended with TimeLimitError.
            pooling: nothing is generated; the one output has the prompt's `vector`.

        Leaving the iterator (break, aclose, cancellation) aborts the request at the next step boundary.

        Raises:
            RequestError: before the first output, when the request is wrong.
            QueueFullError: too many wait; carries the predicted wait.
            TimeLimitError: `timeout` passed.
            StepError: the engine failed on this request alone.
            EngineDeadError: the engine is gone for good, or (EngineLoadingError) a new one is being loaded.
        """
        asked = params.structured_outputs
        try:
            async with asyncio.timeout(how.get("timeout")):  # grammars are built one after the other
                text, ids = await self.tokenize(prompt)
                grammar = await self._grammars.compile(asked) if asked is not None else None
        except TimeoutError:
            raise TimeLimitError(f"the request's timeout of {how['timeout']} s has passed before it began") from None
        self._refuse_dead()  # asked last: from here to the outbox nothing is awaited, so no death goes unnoticed
        group, requests = self._frontend.add(request_id, text, ids, params, grammar=grammar, **how)
        group.on_tokens = on_tokens
        outbox = self._outboxes[id(group)] = Outbox(params.output_kind, relay)
        group.relay = outbox.relay if relay else None
        try:
            for request in requests:
                self._process.channel.send(request)
            while True:
                output = await outbox.take()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finished:
                    return
        finally:
            self._outboxes.pop(id(group), None)
            self._abort(group)

    async def abort(self, request_id: str) -> None:
        """Ends a running request; whoever reads its stream gets a last output with finish_reason "abort"."""
        self._process.channel.send(AbortRequests(self._frontend.running(request_id)))

    async def memory(self) -> dict[str, Any]:
        """The KV memory between two steps (messages.MemoryMap), and what the metrics say of the engine. One map is made
        in MAP_SECONDS, whoever asks.

        Raises EngineDeadError as generate() does, and TimeLimitError: one step takes longer than MAP_TIMEOUT.
        """
        self._refuse_dead()
        now = time.monotonic()
        if self._map is None or (self._map.done() and now - self._mapped_at > MAP_SECONDS):
            self._map, self._mapped_at = asyncio.get_running_loop().create_future(), now
            self._process.channel.send(messages.AskMemory())
        try:
            return await asyncio.wait_for(asyncio.shield(self._map), MAP_TIMEOUT)
        except TimeoutError:
            raise TimeLimitError(f"one step of the engine takes more than {MAP_TIMEOUT:g} s: ask again") from None

    def _refuse_dead(self) -> None:
        if self.dead:
            raise EngineDeadError(self.dead)
        if self.restarting:
            raise EngineLoadingError(f"{self.restarting}; another one is being loaded")

    def progress(self) -> Progress:
        """How the engine stands, now."""
        oldest = self._frontend.oldest_waiting()
        return Progress(
            stage=self._stage(),
            num_unfinished=self.num_unfinished,
            last_step_age=self._watchdog.last_step_age,
            oldest_waiting=0.0 if oldest is None else time.monotonic() - oldest,
            expected_step=self._watchdog.expected_step,
            stall_limit=self._watchdog.limit,
            num_restarts=self._restarts.count,
        )

    def _stage(self) -> str:
        if self.dead:
            return "dead"
        if self.restarting:
            return "restarting"
        if not self.num_unfinished:
            return "idle"
        return "stalled" if self._watchdog.stalled(self._process.cpu_seconds()) else "working"

    def describe(self) -> dict[str, Any]:
        """The settings and what came of them, for people."""
        ready = asdict(self.ready)
        config = asdict(self.config) | {name: ready[name] for name in ("dtype", "kv_cache_dtype", "max_model_len")}
        config.pop("prefix_caching_hash_key")  # a secret
        return {"config": config, "engine": ready, "start_up_seconds": self.timings}

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run, the n answers to one counted apart."""
        return self._frontend.num_unfinished

    async def shutdown(self) -> None:
        """Ends the engine process; running requests get EngineStoppedError."""
        if self.dead is None:
            self.dead = "the engine was shut down"
            self._process.channel.send(Shutdown())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._grammars.close(), self._templates.close())
        await self._process.end()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all(errors.EngineStoppedError)

    async def _load_front(self, chat_template: str | None) -> None:
        """The front's own half, while the engine loads its own."""
        text = await asyncio.to_thread(load_text, self.config, self._files, chat_template=chat_template)
        self.tokenizer, self.chat_template = text.tokenizer, text.chat_template

    async def _await_ready(self) -> EngineReady:
        """What a new process says when it has loaded. Raises what kept it from that."""
        message = await self._process.channel.receive()
        if isinstance(message, EngineFailed):
            kind = getattr(errors, message.kind, EngineDeadError)
            raise kind(message.message)
        if not isinstance(message, EngineReady):
            await self._process.end()
            raise EngineDeadError(f"the engine process {self._process.status()} while it started; see its messages")
        return message

    def _take_ready(self, ready: EngineReady, metrics_compat: str) -> None:
        self.ready = ready
        self._frontend = Frontend(self.tokenizer, ready.vocab_size, self.config, max_model_len=ready.max_model_len)
        self.metrics = Metrics(
            self.model_name,
            cache_config={
                "block_size": str(ready.block_size),
                "num_kv_groups": str(ready.num_kv_groups),
                "cache_dtype": ready.kv_cache_dtype,
                "enable_prefix_caching": str(self.config.enable_prefix_caching),
                "num_gpu_blocks": str(ready.num_blocks),
                "gpu_memory_utilization": str(self.config.gpu_memory_utilization),
            },
            compat=metrics_compat,
            max_model_len=ready.max_model_len,
        )

    async def _supervise(self) -> None:
        """Reads what engines publish, one engine after the other, until there may be no other. Whatever ends this is
        the engine's death: what nobody reads, nobody must wait for."""
        try:
            while await self._restart(await self._read()):
                pass
        except Exception as error:
            log.exception("supervising the engine failed")
            self.dead = self.dead or f"it could not be supervised: {error}"
            self._process.kill()
        self._fail_all()

    async def _read(self) -> str:
        """Takes what the engine publishes until it is gone; says why it went."""
        try:
            await self._process.channel.deliver(self._take)
        except Exception as error:
            log.exception("reading the engine's outputs failed")
            self._process.kill()
            return f"its outputs could not be read: {error}"
        await self._process.end()
        reason = f"the engine process {self._process.status()}"
        box, self._black_box = self._black_box or self._write_black_box(reason), ""
        record = f"; what its scheduler did: octavo replay {self.ready.record}" if self.ready.record else ""
        return f"{reason}{record}{box}"

    def _write_black_box(self, reason: str) -> str:
        return write_black_box(
            reason,
            config=self.config,
            pid=self._process.pid,
            ready=self.ready,
            progress=self.progress(),
            running=self._frontend.children,
            steps=self._last_steps,
        )

    async def _restart(self, reason: str) -> bool:
        """Starts another engine and tells it what was running; False when there were too many."""
        self.restarting = reason
        while (delay := self._restarts.next_delay()) is not None:
            self._end_map(EngineLoadingError(f"{reason}; another one is being loaded"))
            log.error("%s; starting another one in %g s", reason, delay)
            await asyncio.sleep(delay)
            await self._process.end()
            process = EngineProcess()
            try:
                process.load(self.config, self._files)
                await process.open()
                self._process = process  # now that it has a channel: somebody may be leaving
                self.ready = await self._await_ready()
            except OctavoError as error:
                reason = self.restarting = str(error)
                continue
            self._watchdog.reset()
            requests, guilty = self._frontend.resubmissions()
            if guilty is not None:
                self._hand_out(guilty)
            for request in requests:
                self._process.channel.send(request)
            log.warning("the engine runs again; %d requests go on", len(requests))
            self.restarting = None
            self.metrics.on_restart()
            return True
        self.dead = f"{reason}; there were {MAX_RESTARTS} restarts within {RESTART_WINDOW / 60:g} minutes already"
        self.restarting = None
        log.error("%s", self.dead)
        return False

    async def _watch(self) -> None:
        """Kills an engine that has work and makes none of it; reading it, `_supervise` then finds it gone."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            late = time.monotonic() - looked - LOOK_SECONDS
            looked += LOOK_SECONDS + late
            if late > LOOK_SECONDS:  # this loop itself stood still, so the engine's steps may lie unread
                continue
            if not self._frontend.num_unfinished or self.dead or self.restarting:
                self._watchdog.reset()
            elif self._watchdog.stalled(self._process.cpu_seconds()):
                process = self._process
                reason = f"the engine made no step for {self._watchdog.silence:.1f} s: it is killed"
                self._black_box = self._write_black_box(reason)
                log.error("%s%s", reason, self._black_box)
                process.tell_stacks()
                await asyncio.sleep(STACK_SECONDS)
                process.kill()
                self._watchdog.reset()

    def _take(self, outputs: StepOutputs) -> None:
        self._watchdog.heard(outputs.records)
        self._last_steps.extend(outputs.records)
        if outputs.memory and self._map and not self._map.done():
            self._map.set_result({**asdict(outputs.memory), "metrics": self.metrics.now()})  # of the step before it
        updates, finishes, arrivals = self._frontend.process(outputs.deltas)
        for finish in finishes:
            self._process.channel.send(finish)
        now = time.monotonic()
        for (previous, arrival, count), times in arrivals.items():
            self.metrics.on_tokens(now, previous, arrival, count, times)
        for update in updates:
            self._hand_out(update)
        self.metrics.on_steps(outputs.records)
        if self._frontend.num_unfinished == 0:
            self.metrics.on_idle()

    def _hand_out(self, update: Update) -> None:
        group = update.group
        if group.finished:
            tell_finished(group, self.metrics)
        outbox = self._outboxes.get(id(group))
        if outbox is None:
            return
        if group.error:
            if isinstance(group.error, QueueFullError):
                self.metrics.on_refused()
            outbox.put(group.error)
        elif update.output is not None:
            outbox.put(update.output)

    def _abort(self, group: Group) -> None:
        if running := self._frontend.abort(group):
            self._process.channel.send(AbortRequests(running))
            tell_finished(group, self.metrics)

    def _end_map(self, error: EngineDeadError) -> None:
        """Tells it to whoever waits for a map of the memory."""
        if self._map and not self._map.done():
            self._map.set_exception(error)

    def _fail_all(self, kind: type[EngineDeadError] = EngineDeadError) -> None:
        self._end_map(kind(self.dead or "the engine is gone"))
        for group in self._frontend.fail_all():
            tell_finished(group, self.metrics, FinishReason.ERROR)
            if outbox := self._outboxes.get(id(group)):
                outbox.put(kind(self.dead or "the engine is gone"))
