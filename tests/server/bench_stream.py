"""CPU microseconds of the front per streamed token: `python tests/server/bench_stream.py [streams] [tokens]`.

The real application under uvicorn in this process, an engine that costs almost nothing, a client in another process.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace

from fake_engine import FakeEngine

from octavo.outputs import CompletionOutput, RequestOutput
from octavo.server.app import create_app
from octavo.server.loop import run_server

CLIENT = """
import asyncio, sys
port, streams, tokens = map(int, sys.argv[1:])
body = '{"messages":[{"role":"user","content":"hi"}],"max_tokens":%d,"stream":true}' % tokens
request = f"POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\nContent-Length: {len(body)}\\r\\nConnection: close\\r\\n\\r\\n{body}"
async def one():
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    answer = await reader.read(-1)
    assert answer.count(b'"content"') == tokens + 1 and b"[DONE]" in answer, answer[-300:]
    writer.close()
async def main():
    await asyncio.gather(*(one() for _ in range(streams)))
asyncio.run(main())
"""  # noqa: E501


class Quick(FakeEngine):
    """Yields the same delta again and again."""

    async def generate(self, prompt, params, request_id, **_) -> AsyncGenerator[RequestOutput, None]:
        output = RequestOutput(request_id, None, prompt, [CompletionOutput(0, " token", [5])], False)
        for _ in range(params.max_tokens):
            await asyncio.sleep(0)
            yield output
        yield RequestOutput(request_id, None, prompt, [CompletionOutput(0, "", [], finish_reason="length")], True)


async def main(streams: int, tokens: int) -> None:
    engine = Quick(max_model_len=1 << 20)
    engine.config = SimpleNamespace(max_logprobs=0)
    ports: asyncio.Queue[int] = asyncio.Queue()
    app = create_app(engine, served_model_names=["fake"])
    server = asyncio.create_task(run_server(app, port=0, ready=ports.put_nowait))
    port = await ports.get()
    for name, num in (("warm-up", 10), ("measured", tokens)):
        began = time.process_time()
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, str(port), str(streams), str(num))
        if await process.wait():
            raise subprocess.CalledProcessError(process.returncode or 1, "client")
        spent = time.process_time() - began
        print(f"{name}: {streams} streams x {num} tokens, {spent / streams / num * 1e6:.1f} us of CPU a token")
    server.cancel()
    await asyncio.wait([server])


if __name__ == "__main__":
    asyncio.run(main(*(int(number) for number in sys.argv[1:] or ("16", "1000"))))
