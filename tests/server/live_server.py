"""A FakeEngine behind the real application under uvicorn."""

from __future__ import annotations

import asyncio
import threading

import httpx
import openai
from fake_engine import FakeEngine

from octavo.server.app import create_app
from octavo.server.loop import run_server


class Server:
    """The application under uvicorn, in a thread of its own; `loop` has further arguments of run_server."""

    def __init__(self, engine: FakeEngine, **kwargs: object) -> None:
        self.engine = engine
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(kwargs,))
        self._thread.start()
        assert self._ready.wait(60)
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def _run(self, kwargs: dict[str, object]) -> None:
        asyncio.run(self._serve(kwargs))

    async def _serve(self, kwargs: dict[str, object]) -> None:
        self._loop = asyncio.get_running_loop()
        loop = {"drain_seconds": 1, **kwargs.pop("loop", {})}
        app = create_app(self.engine, served_model_names=["fake", "alias"], **kwargs)
        self._task = asyncio.create_task(run_server(app, port=0, ready=self._on_ready, **loop))
        await asyncio.wait([self._task])

    def _on_ready(self, port: int) -> None:
        self.port = port
        self._ready.set()

    def close(self) -> None:
        self.client.close()
        self.http.close()
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(60)
        assert not self._thread.is_alive()
