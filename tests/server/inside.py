"""The application called in this process, without a socket."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from fake_engine import FakeEngine

from octavo.server.app import create_app


class Inside:
    """Requests to an application over a FakeEngine; `headers` go with each."""

    def __init__(self, engine: FakeEngine | None = None, headers: dict[str, str] | None = None, **kwargs: Any) -> None:
        self.engine = engine or FakeEngine()
        self.app = create_app(self.engine, served_model_names=["fake"], **kwargs)
        self.headers = headers or {}

    def __call__(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            headers = {**self.headers, **kwargs.pop("headers", {})}
            async with httpx.AsyncClient(transport=transport, base_url="http://octavo") as client:
                return await client.request(method, path, headers=headers, **kwargs)

        return asyncio.run(ask())
