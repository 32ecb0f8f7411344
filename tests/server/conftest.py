from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_engine import FakeEngine
from live_server import Server


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(engine: FakeEngine | None = None, **kwargs: object) -> Server:
        servers.append(Server(engine or FakeEngine(), **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
    server = Server(FakeEngine())
    yield server
    server.close()
