"""The engine for servers: its own process, one event loop in front. Streaming, abort, honest death.

engine = await AsyncEngine.start(EngineConfig(model="smollm2"))
async for output in engine.generate("Hello", SamplingParams(max_tokens=8), "request-1"):
    ...
await engine.shutdown()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator

from octavo import errors
from octavo.config import EngineConfig
from octavo.engine.channel import FrontChannel, StartEngine
from octavo.engine.frontend import Frontend, Group, Prompt
from octavo.engine.outbox import Outbox
from octavo.errors import EngineDeadError
from octavo.messages import AbortRequests, EngineFailed, EngineReady, Shutdown, StepOutputs
from octavo.models.hub import resolve_model
from octavo.models.reader import read_spec
from octavo.models.spec import ModelFiles, ModelSpec
from octavo.observe.metrics import Metrics
from octavo.outputs import RequestOutput
from octavo.request import FinishReason
from octavo.sampling_params import SamplingParams
from octavo.text.chat import ChatTemplate
from octavo.text.load import load_text
from octavo.text.tokenizer import LONG_TEXT, Tokenizer

SHUTDOWN_SECONDS = 5.0
log = logging.getLogger("octavo.engine")


class AsyncEngine:
    """An engine process and the front half that talks to it. Make it with `start`.

    Attributes:
        config, spec, ready: what was asked for, the model in numbers, what the engine reported.
        tokenizer, chat_template: None where the engine takes token ids only.
        metrics: Prometheus metrics, fed from StepRecords and arrivals.
        dead: why the engine is gone, or None.
        timings: seconds by phase of the start; they add up to the whole.
    """

    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        self.config = config
        self.model_name = config.served_model_name or config.model
        self.dead: str | None = None
        self.timings: dict[str, float] = {}
        self.ready: EngineReady
        self.spec: ModelSpec
        self.tokenizer: Tokenizer | None
        self.chat_template: ChatTemplate | None
        self.metrics: Metrics
        self._files = files
        self._process: subprocess.Popen[bytes]
        self._channel: FrontChannel
        self._frontend: Frontend
        self._outboxes: dict[int, Outbox] = {}
        self._reader: asyncio.Task[None]

    @classmethod
    async def start(
        cls, config: EngineConfig, *, chat_template: str | None = None, metrics_compat: str = "octavo"
    ) -> AsyncEngine:
        """Finds the model, spawns the engine process, loads the text half meanwhile, returns when it is ready.

        Raises what the model or the config deserve: ModelError, ConfigError, MemoryPlanError, EngineDeadError.
        """
        began = time.monotonic()
        files = resolve_model(
            config.model,
            revision=config.revision,
            download_dir=config.download_dir,
            load_format=config.load_format,
        )
        engine = cls(config, files)
        engine.timings["find model"] = time.monotonic() - began
        await engine._spawn()
        try:
            await engine._load_front(chat_template, metrics_compat)
            await engine._await_ready()
        except BaseException:
            await engine._end_process()
            raise
        whole = time.monotonic() - began
        engine.timings.update(engine.ready.timings)
        engine.timings["process start, imports"] = max(0.0, whole - sum(engine.timings.values()))
        engine._reader = asyncio.create_task(engine._read())
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

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        tenant: str = "",
        weight: float = 1.0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Streams the answer; `params.output_kind` decides whether outputs are cumulative, deltas, or one at the end.

        Args:
            prompt, params, request_id: as in vLLM.
            priority: lower is admitted first, under the policy `priority`.
            cache_salt: only requests with the same one share cached prefixes.
            tenant, weight: whose share it uses, and how large that is, under the policy `fair`.
            timeout: seconds after which the request is ended with TimeLimitError.

        Leaving the iterator (break, aclose, cancellation) aborts the request at the next step boundary.

        Raises:
            RequestError: before the first output, when the request is wrong.
            QueueFullError: too many wait; carries the predicted wait.
            TimeLimitError: `timeout` passed.
            StepError: the engine failed on this request alone.
            EngineDeadError: the engine process is gone.
        """
        text, ids = await self.tokenize(prompt)
        if self.dead:  # asked last: from here to the outbox nothing is awaited, so no death goes unnoticed
            raise EngineDeadError(self.dead)
        group, requests = self._frontend.add(
            request_id,
            text,
            ids,
            params,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            weight=weight,
            timeout=timeout,
        )
        outbox = self._outboxes[id(group)] = Outbox(params.output_kind)
        try:
            for request in requests:
                self._channel.send(request)
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
        self._channel.send(AbortRequests(self._frontend.running(request_id)))

    async def shutdown(self) -> None:
        """Ends the engine process; running requests get EngineDeadError."""
        if self.dead is None:
            self.dead = "the engine was shut down"
            self._channel.send(Shutdown())
        await self._end_process()
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._fail_all()

    async def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "octavo.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._channel = await FrontChannel.open(ours)
        files = self._files
        self._channel.send(StartEngine(self.config, files.name, files.format, str(files.path)))

    async def _load_front(self, chat_template: str | None, metrics_compat: str) -> None:
        """The front's own half, while the engine loads its own."""
        config = self.config
        self.spec = await asyncio.to_thread(read_spec, self._files, max_model_len=config.max_model_len)
        text = await asyncio.to_thread(load_text, config, self._files, chat_template=chat_template)
        self.tokenizer, self.chat_template = text.tokenizer, text.chat_template
        self._metrics_compat = metrics_compat

    async def _await_ready(self) -> None:
        message = await self._channel.receive()
        if isinstance(message, EngineFailed):
            await self._end_process()
            kind = getattr(errors, message.kind, EngineDeadError)
            raise kind(message.message)
        if not isinstance(message, EngineReady):
            await self._end_process()
            raise EngineDeadError(f"the engine process {self._exit_status()} while it started; its messages are above")
        self.ready = message
        self._frontend = Frontend(self.tokenizer, self.spec, self.config, max_model_len=message.max_model_len)
        self.metrics = Metrics(
            self.model_name,
            cache_config={
                "block_size": str(message.block_size),
                "cache_dtype": self.config.kv_cache_dtype,
                "enable_prefix_caching": str(self.config.enable_prefix_caching),
                "num_gpu_blocks": str(message.num_blocks),
                "gpu_memory_utilization": str(self.config.gpu_memory_utilization),
            },
            compat=self._metrics_compat,
            max_model_len=message.max_model_len,
        )

    async def _read(self) -> None:
        """Takes what the engine publishes until it is gone. A failure here is the engine's death too: what nobody
        reads, nobody must wait for."""
        try:
            while (message := await self._channel.receive()) is not None:
                if isinstance(message, StepOutputs):
                    self._take(message)
        except Exception as error:
            log.exception("reading the engine's outputs failed")
            self.dead = self.dead or f"its outputs could not be read: {error}"
            self._process.kill()
        if self.dead is None:
            await asyncio.to_thread(self._process.wait)
            self.dead = f"the engine process {self._exit_status()}"
        self._fail_all()

    def _take(self, outputs: StepOutputs) -> None:
        updates, finishes, arrivals = self._frontend.process(outputs.deltas)
        for finish in finishes:
            self._channel.send(finish)
        now = time.monotonic()
        for arrival in arrivals:
            self.metrics.on_tokens(now, arrival.previous, arrival.group.metrics.arrival_time, arrival.count)
        for update in updates:
            group = update.group
            if group.finished:
                self._observe_finished(group)
            outbox = self._outboxes.get(id(group))
            if outbox is None:
                continue
            if group.error:
                outbox.put(group.error)
            elif update.output is not None:
                outbox.put(update.output)
        self.metrics.on_steps(outputs.records)
        if self._frontend.num_unfinished == 0:
            self.metrics.on_idle()

    def _observe_finished(self, group: Group, unfinished: FinishReason = FinishReason.ABORT) -> None:
        """Tells the metrics how each answer of a group ended; `unfinished` is for those that were cut off."""
        times = group.metrics
        for child in group.children:
            self.metrics.on_finished(
                child.output.finish_reason or unfinished,
                prompt_tokens=len(group.prompt_token_ids),
                output_tokens=len(child.output.token_ids),
                cached_tokens=group.num_cached_tokens,
                n=group.params.n if child is group.children[0] else None,
                max_tokens=group.params.max_tokens,
                arrival=times.arrival_time,
                queue_seconds=group.queue_seconds,
                first_token=child.first_token_time,
                last_token=child.last_token_time,
                finished=times.finished_time or time.monotonic(),
            )

    def _abort(self, group: Group) -> None:
        if running := self._frontend.abort(group):
            self._channel.send(AbortRequests(running))
            self._observe_finished(group)

    def _fail_all(self) -> None:
        for group in self._frontend.fail_all():
            self._observe_finished(group, FinishReason.ERROR)
            if outbox := self._outboxes.get(id(group)):
                outbox.put(EngineDeadError(self.dead or "the engine is gone"))

    def _exit_status(self) -> str:
        code = self._process.poll()
        if code is None:
            return "closed its channel"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    async def _end_process(self) -> None:
        await self._channel.close()
        try:
            await asyncio.to_thread(self._process.wait, SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
