"""Requests of an OpenAI batch file, put through the server's own application in this process."""

import asyncio
import json
import uuid
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from octavo.errors import ConfigError

MAX_LINE = 16 << 20  # bytes
MAX_ANSWER = 1 << 30
_BEGIN = b'{"id": "batch_req_'  # of every answer
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/score")


def read_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file that are not empty, with their numbers; None for one too long, which is never held whole."""
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE + 1):
            number += 1
            too_long = len(line) > MAX_LINE
            while len(line) > MAX_LINE and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE + 1)
            if too_long or line.strip():
                yield number, None if too_long else line


def answered(path: Path) -> tuple[set[str], int]:
    """The custom_ids that a batch which was broken off has answered, and how many bytes of the file those lines are.

    What follows them is a line that a killed run did not finish. Raises ConfigError: the file is something else.
    """
    known, size = set[str](), 0
    if not path.exists():
        return known, size
    with path.open("rb") as file:
        while line := file.readline(MAX_ANSWER):
            if not line.endswith(b"\n") and (line.startswith(_BEGIN) or _BEGIN.startswith(line)):
                break
            try:
                known.update([json.loads(line)["custom_id"]] if line.strip() else ())
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{path} holds something else than a batch's answers: take another -o") from error
            size += len(line)
    return known, size


async def answer_all(
    app: ASGIApp, source: Path, target: Path, *, at_once: int, done: Callable[[bool], None]
) -> tuple[int, int]:
    """Answers the lines of `source` that `target` does not answer yet, and adds their answers there as they come.

    `done` is told of every line, and whether it went well. Returns how many did and did not; those skipped are neither.
    """
    counts, running = [0, 0], set[asyncio.Task[dict[str, Any]]]()
    known, size = answered(target)
    with target.open("ab") as file:
        file.truncate(size)

        async def wait(most: int) -> None:
            while len(running) > most:
                ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    running.discard(task)
                    answer = task.result()
                    failed = answer["error"] is not None or answer["response"]["status_code"] != 200
                    file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                    counts[failed] += 1
                    done(not failed)
                file.flush()

        for number, line in read_lines(source):
            request, error = _request(line)
            if request.get("custom_id") in known:
                done(True)
                continue
            running.add(asyncio.create_task(_answer(app, number, request, error)))
            await wait(at_once - 1)
        await wait(0)
    return counts[0], counts[1]


def _request(line: bytes | None) -> tuple[dict[str, Any], str]:
    """A request, and what is wrong with it."""
    if line is None:
        return {}, f"the line has more than {MAX_LINE} bytes"
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"the line is not JSON: {error}"
    if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
        return {}, "a line is an object with custom_id, method, url and body"
    known = {"custom_id", "method", "url", "body"}
    if unknown := sorted(request.keys() - known):
        return request, f"{unknown[0]} is no field of a batch's line"
    if request.get("method", "POST") != "POST" or request.get("url") not in URLS:
        return request, f"method must be POST and url one of {', '.join(URLS)}"
    if not isinstance(request.get("body"), dict) or request["body"].get("stream"):
        return request, "body must be an object, without stream"
    return request, ""


async def _answer(app: ASGIApp, number: int, request: dict[str, Any], error: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": request.get("custom_id", "")}
    if error:
        what = {"code": "invalid_request", "message": f"line {number}: {error}"}
        return {**answer, "response": None, "error": what}
    status, request_id, body = await _post(app, request["url"], json.dumps(request["body"]).encode())
    return {**answer, "response": {"status_code": status, "request_id": request_id, "body": body}, "error": None}


async def _post(app: ASGIApp, path: str, body: bytes) -> tuple[int, str, Any]:
    """(status, request id, JSON) of a request to the application."""
    sent: list[MutableMapping[str, Any]] = []
    unread = [{"type": "http.request", "body": body}]

    async def receive() -> MutableMapping[str, Any]:
        if not unread:
            await asyncio.Event().wait()  # the client stays
        return unread.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    await app(scope, receive, send)
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"])[b"x-request-id"].decode(), json.loads(text)
