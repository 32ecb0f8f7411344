"""Mutated requests against a real server on a tiny model: `python tools/fuzz_server.py --requests 100000 --seed 1`.

Each request is drawn from (seed, number) alone: a right one for some route, in which values are replaced by hostile
ones, fields left out, doubled, renamed and invented, bytes flipped, cut and repeated, or the HTTP around it broken.
What must hold, for each:

- it is answered or hung up on within SECONDS (no hang), and never with 500 or 502;
- 503 and 504 come only with a documented code; an error has its API's shape; a stream ends as streams do;

and for the server: canary requests in between keep their tokens to the bit, the engine is never restarted, nothing is
logged as a failure, and in the end nothing runs and the whole pool can be taken.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import datetime
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e")]

from serving import serving  # noqa: E402
from tiny_text import FLAGS, write_tiny_text  # noqa: E402

from lab.machine import describe_machine  # noqa: E402
from tools.wire import HungUp, Reply, Wire, request  # noqa: E402

SECONDS = 60.0
CUT_SECONDS = 1.0
CANARY_EVERY = 250
POOL_TOKENS = 512
CODES_503 = {"engine_dead", "loading", "draining", "stalled"}
USER = {"role": "user", "content": "Hello there"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "time", "description": "now", "parameters": SCHEMA}}
CALL = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": '{"a": 1}'}}
SYSTEM = {"role": "system", "content": "be"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3, "max_tokens": 3, "stop": ["x", "yz"]}
SEEDS: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "Once upon", "max_tokens": 3},
        {"prompt": ["ab", "cd"], "n": 2, "stream": True, "stream_options": {"include_usage": True}, **SAMPLING},
        {
            "prompt": [5, 6, 7],
            "logprobs": 2,
            "echo": False,
            "logit_bias": {"5": -1.5},
            "bad_words": ["ab"],
            "max_tokens": 2,
        },
        {"prompt": [[5], [6, 7]], "best_of": 2, "use_beam_search": True, "length_penalty": 1.5, "max_tokens": 3},
        {
            "prompt": "x",
            "structured_outputs": {"regex": "[ab]{2}"},
            "max_tokens": 4,
            "allowed_token_ids": [1, 66, 67, 68],
        },
        {"prompt": "x", "response_format": {"type": "json_object"}, "max_tokens": 4, "cache_salt": "s", "timeout": 5.0},
        {"prompt": [5, 6, 7, 8], "prompt_logprobs": 2, "echo": True, "logprobs": 1, "max_tokens": 2},
        {"prompt": "a b c d e f", "truncate_prompt_tokens": 3, "min_tokens": 1, "ignore_eos": True, "max_tokens": 2},
    ],
    "/v1/chat/completions": [
        {"messages": [USER], "max_tokens": 3},
        {
            "messages": [{"role": "system", "content": "be"}, USER],
            "stream": True,
            "logprobs": True,
            "top_logprobs": 2,
            **SAMPLING,
        },
        {"messages": [USER], "tools": [TOOL], "tool_choice": "required", "max_tokens": 5, "parallel_tool_calls": False},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "12", "tool_call_id": "c1"},
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "time"}},
            "max_tokens": 5,
        },
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
            "chat_template_kwargs": {"enable_thinking": False},
            "max_completion_tokens": 4,
        },
    ],
    "/v1/messages": [
        {"model": "tiny", "max_tokens": 3, "messages": [USER]},
        {
            "model": "tiny",
            "max_tokens": 4,
            "stream": True,
            "system": [{"type": "text", "text": "be"}],
            "messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]}],
            "tools": [{"name": "time", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any"},
        },
    ],
    "/v1/messages/count_tokens": [{"model": "tiny", "messages": [USER], "system": "be"}],
    "/v1/embeddings": [{"input": "a b"}, {"input": [[5, 6], [7]], "encoding_format": "base64"}],
    "/v1/score": [{"text_1": "a", "text_2": ["b", "c"]}],
    "/tokenize": [{"prompt": "a b"}, {"messages": [USER], "return_token_strs": True}],
    "/detokenize": [{"tokens": [5, 6, 7]}],
}
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 17, 255, 1 << 31, (1 << 63) - 1, 1 << 64, -(1 << 63), 10**400, 0.0, -0.0, 1e-320,
    1e308, float("inf"), float("-inf"), float("nan"), "", " ", "0", "-1", "1e999", "NaN", "\x00", "\ud800",
    "\udfff\ud800", "\u202e", "\N{SNOWMAN}" * 50, "A" * 5000, "{{ 7*7 }}", "{% for i in range(10**9) %}x{% endfor %}",
    "../../etc/passwd", "<s></s>", "http://169.254.169.254/", "(a+)+$", "(" * 200, "[" * 3000, '{"a":' * 500, [], {},
    [[]], [None], [0], [""], [{}], {"": ""}, {"a": {"b": {"c": {}}}}, {"$ref": "#"}, {"items": {"$ref": "#"}},
    ["a"] * 300, [1] * 600, {str(i): i for i in range(300)}, {"type": "text"}, {"type": "image_url", "image_url": {}},
]  # fmt: skip
NAMES = [
    "n",
    "stream",
    "model",
    "prompt",
    "messages",
    "__proto__",
    "constructor",
    "user",
    "logprobs",
    "echo",
    "suffix",
    "x" * 300,
]
GETS = [
    "/v1/models",
    "/v1/models/tiny",
    "/health",
    "/health/live",
    "/health/progress",
    "/metrics",
    "/load",
    "/server_info",
]
GETS += ["/version", "/openapi.json", "/", "/v1/../health", "/%00", "/v1/models/%ff%fe", "/v1/models/" + "a" * 3000]


def mutate(rng: random.Random, value: Any) -> Any:
    """`value`, somewhere changed."""
    paths: list[tuple[Any, Any]] = []
    _walk(value, paths)
    if not paths:
        return rng.choice(HOSTILE)
    holder, key = rng.choice(paths)
    kind = rng.random()
    if kind < 0.6:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    elif kind < 0.7:
        del holder[key]
    elif kind < 0.8 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * rng.choice([-1, 2, 1000]) + rng.choice([0, 1, -1])
    elif kind < 0.8 and isinstance(holder[key], str):
        at = rng.randint(0, len(holder[key]))
        holder[key] = (
            holder[key][:at] + chr(rng.choice([0, 34, 92, 0x7F, 0xE9, 0x2603, 0x1F600, 0xD800])) + holder[key][at:]
        )
    elif kind < 0.9 and isinstance(holder, dict):
        holder[rng.choice(NAMES)] = copy.deepcopy(rng.choice(HOSTILE))
    elif isinstance(holder, list):
        holder.extend(copy.deepcopy(holder[key]) for _ in range(rng.choice([1, 3, 40])))
    else:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    return value


def _walk(value: Any, paths: list[tuple[Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        paths.append((value, key))
        _walk(inner, paths)


def example(schema: dict[str, Any], document: dict[str, Any]) -> Any:
    """Something that a schema of the OpenAPI file describes, for routes that have no seed."""
    if "$ref" in schema:
        return example(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document)
    if "const" in schema or "enum" in schema:
        return schema.get("const", schema.get("enum", [None])[0])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return example(schema[several][0], document)
    kind = schema.get("type", "object")
    if kind == "object":
        inner = schema.get("properties", {})
        return {name: example(inner[name], document) for name in schema.get("required", ()) if name in inner}
    if kind == "array":
        return [example(schema.get("items", {}), document)] * max(1, schema.get("minItems", 1))
    return {"string": "a b", "integer": 3, "number": 0.5, "boolean": True}.get(kind)


class Fuzzer:
    """Draws requests, judges answers."""

    def __init__(self, seed: int, document: dict[str, Any]) -> None:
        self.seed = seed
        self.bodies = copy.deepcopy(SEEDS)
        for path, methods in document["paths"].items():
            content = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
            if content and path not in self.bodies:
                self.bodies[path] = [example(content["schema"], document)]
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def draw(self, number: int) -> tuple[str, bytes]:
        """A request's path and its bytes."""
        rng = random.Random(f"{self.seed}:{number}")
        if rng.random() < 0.05:
            path = rng.choice(GETS)
            method = rng.choice(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "G\x01T", "get"])
            return path, request(method, path)
        path = rng.choice(list(self.bodies))
        body = copy.deepcopy(rng.choice(self.bodies[path]))
        for _ in range(rng.choice([0, 0, 1, 1, 1, 1, 2, 6])):
            body = mutate(rng, body)
        raw = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.15:
            raw = self._spoil(rng, raw)
        if rng.random() < 0.1:
            return path, self._spoil_http(rng, path, raw)
        return path, request("POST", path, raw)

    def _spoil(self, rng: random.Random, raw: bytes) -> bytes:
        at = rng.randrange(len(raw) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            return raw[:at]
        if kind == 1:
            return raw[:at] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 8))) + raw[at + 1 :]
        if kind == 2:
            return raw[:at] + raw[at : at + 20] * rng.choice([2, 50]) + raw[at:]
        if kind == 3:
            return rng.choice(
                [b"", b"null", b"[]", b'"a"', b"[" * 100_000, b'{"a":' * 20_000, b"\xff\xfe{}", b"1" * 5000]
            )
        return raw[:-1] + b',"prompt":"doubled","max_tokens":1}'

    def _spoil_http(self, rng: random.Random, path: str, raw: bytes) -> bytes:
        length = f"Content-Length: {len(raw)}"
        typed = "Content-Type: application/json"
        odd = rng.choice(
            [
                ("Content-Type: text/plain", length),
                ("Content-Type: application/json; charset=utf-16", length),
                (typed, f"Content-Length: {10**18}"),
                (typed, "Content-Length: -1"),
                (typed, "Content-Length: 1e3"),
                (typed, length, length),
                (typed, length, "Transfer-Encoding: chunked"),
                (typed, "Transfer-Encoding: chunked"),
                (typed, length, "X-Request-Id: " + rng.choice(["a" * 200, "http://10.0.0.1/", "\u00e9", "ok-1"])),
                (typed, length, "Authorization: Bearer " + "k" * 300),
                (typed, length, "X-Long: " + "a" * 70_000),
                (typed, length, "Expect: 100-continue"),
                (typed, length, "Bad\x00Name: 1"),
                (typed, length, "Accept-Encoding: gzip", "Connection: close"),
                (typed, length, *[f"X-{i}: {i}" for i in range(200)]),
            ]
        )
        if "Transfer-Encoding: chunked" in odd and rng.random() < 0.5:
            raw = rng.choice([b"zz\r\n", b"ffffffffffffffff\r\n", b"%x\r\n" % len(raw)]) + raw + b"\r\n0\r\n\r\n"
        lines = [f"POST {path} HTTP/1.1", "Host: octavo", *odd, "", ""]
        return "\r\n".join(lines).encode("utf-8", "surrogatepass") + raw

    def judge(self, number: int, path: str, reply: Reply) -> None:
        """Books an answer; what must not be is a failure."""
        self.counts[str(reply.status)] += 1
        wrong = None
        if reply.status in (500, 502):
            wrong = "our fault"
        elif reply.status in (503, 504, 529):
            wrong = "the server says that it cannot serve"  # nothing here is a reason for that
        elif reply.status >= 400:
            wrong = self._wrong_shape(path, reply)
        elif reply.headers.get("content-type", "").startswith("text/event-stream"):
            self.counts["streams"] += 1
            text = reply.body
            if path == "/v1/messages":
                if b"event: message_stop" not in text[-200:] and b"event: error" not in text:
                    wrong = "a stream without its end"
            elif path.startswith("/v1/") and "completions" in path and not text.endswith(b"data: [DONE]\n\n"):
                wrong = "a stream without its end"
            if b"server_error" in text or b"api_error" in text:
                wrong = "our fault, in a stream"
        if wrong:
            self.fail(number, f"{wrong}: {reply.status} {reply.body[:300]!r}")

    def _wrong_shape(self, path: str, reply: Reply) -> str | None:
        if "x-request-id" not in reply.headers:  # refused by the HTTP layer: it did not come to a request
            return None if reply.status in (400, 431) else "an error without X-Request-Id"
        if not reply.body:
            return None  # HEAD
        try:
            document = reply.json()
            error = document["error"]
            known = isinstance(error["message"], str) and isinstance(error["type"], str)
        except (ValueError, KeyError, TypeError):
            return "an error in no known shape"
        self.counts[f"{reply.status} {error.get('code') or error['type']}"] += 1
        return None if known else "an error in no known shape"

    def fail(self, number: int, what: str) -> None:
        """Notes what must not be."""
        self.counts["failures"] += 1
        if len(self.failures) < 50:
            _, raw = self.draw(number)
            self.failures.append(f"request {number} of seed {self.seed}: {what}\n    {raw[:600]!r}")


async def canary(url: str) -> list[Any]:
    """Answers that must stay the same: greedy, sampled, with logprobs, a chat, a grammar."""
    wire = Wire(url)
    greedy = {"prompt": "The canary", "max_tokens": 12, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    sampled = {"prompt": "sings", "max_tokens": 12, "seed": 7, "n": 2, "ignore_eos": True}
    chat = {"messages": [USER], "max_tokens": 8, "temperature": 0, "response_format": {"type": "json_object"}}
    answers = []
    for path, body in (("completions", greedy), ("completions", sampled), ("chat/completions", chat)):
        reply = await wire.post(f"/v1/{path}", {**body, "return_token_ids": True})
        answers.append([(c["token_ids"], c["logprobs"]) for c in reply.json()["choices"]])
    wire.close()
    return answers


async def fuzz(fuzzer: Fuzzer, url: str, first: int, num_requests: int, connections: int) -> None:
    """All requests, some at a time, canaries in between."""
    numbers = iter(range(first, first + num_requests))
    probe = Wire(url)
    expected = await canary(url)
    bar = tqdm(total=num_requests, unit="request", disable=None, file=sys.stderr)

    async def work() -> None:
        wire = Wire(url)
        for number in numbers:
            path, raw = fuzzer.draw(number)
            wants_body = not raw.startswith(b"HEAD ")
            try:
                # who announces more than it sends is waited for, as long as a body may take: it leaves
                seconds = CUT_SECONDS if _is_cut(raw) else SECONDS
                reply = await asyncio.wait_for(wire.ask(raw, has_body=wants_body), seconds)
            except TimeoutError:
                fuzzer.counts["left"] += 1
                if seconds == SECONDS:
                    fuzzer.fail(number, f"no answer within {SECONDS:g} s")
                wire.close()
            except HungUp:
                fuzzer.counts["hung up"] += 1
                wire.close()
            except (ValueError, IndexError) as error:
                fuzzer.fail(number, f"no HTTP: {error}")
                wire.close()
            else:
                fuzzer.judge(number, path, reply)
            if number % CANARY_EVERY == 0:
                fuzzer.counts["canaries"] += 1
                if await canary(url) != expected:
                    fuzzer.fail(number, "a canary's tokens changed")
            bar.update()
        wire.close()

    await asyncio.gather(*(work() for _ in range(connections)))
    bar.close()
    while (await probe.get("/load")).json()["server_load"]:
        await asyncio.sleep(0.05)
    progress = (await probe.get("/health/progress")).json()["progress"]
    if progress["num_restarts"] or progress["stage"] != "idle":
        fuzzer.fail(first, f"the engine stands at {progress}")
    whole = {"prompt": [5] * (POOL_TOKENS - 2), "max_tokens": 2, "ignore_eos": True}
    reply = await probe.post("/v1/completions", whole)
    if reply.status != 200 or reply.json()["usage"]["completion_tokens"] != 2:
        fuzzer.fail(first, f"the whole pool cannot be taken in the end: {reply.body[:300]!r}")
    if await canary(url) != expected:
        fuzzer.fail(first, "the last canary's tokens changed")
    probe.close()


def _is_cut(raw: bytes) -> bool:
    return b"Content-Length: 1000000000000000000" in raw or b"Transfer-Encoding: chunked" in raw


def run(num_requests: int, *, seed: int, first: int = 0, connections: int = 8, flags: tuple[str, ...] = ()) -> Fuzzer:
    """Starts a server, fuzzes it, ends it; the Fuzzer has what happened."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_text(Path(folder), max_model_len=POOL_TOKENS)
        pool = ("--num-gpu-blocks-override", str(POOL_TOKENS // 16), "--max-num-seqs", "16", "--record", "off")
        name = ("--served-model-name", "tiny")
        with serving(model, *FLAGS, *name, *pool, *flags) as server:
            document = asyncio.run(_once(server.url, "/openapi.json"))
            fuzzer = Fuzzer(seed, document)
            asyncio.run(fuzz(fuzzer, server.url, first, num_requests, connections))
            for line in server.lines:
                if "Traceback" in line or "failed" in line or " ERROR" in line:
                    fuzzer.fail(first, f"the log says: {line.strip()}")
    return fuzzer


async def _once(url: str, path: str) -> Any:
    wire = Wire(url)
    try:
        return (await wire.get(path)).json()
    finally:
        wire.close()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first request: to go on, or to repeat one")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--out", type=Path, help="add the result to this JSON file")
    arguments = parser.parse_args()
    began = time.monotonic()
    fuzzer = run(arguments.requests, seed=arguments.seed, first=arguments.first, connections=arguments.connections)
    seconds = time.monotonic() - began
    for failure in fuzzer.failures:
        print(failure)
    counts = dict(sorted(fuzzer.counts.items()))
    print(f"{arguments.requests} requests in {seconds:.0f} s, {fuzzer.counts['failures']} failures")
    print("\n".join(f"{count:>10,}  {name}" for name, count in counts.items()))
    if arguments.out:
        old = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
        command = f"python tools/fuzz_server.py --seed {arguments.seed} --first {arguments.first}"
        entry = {
            "command": f"{command} --requests {arguments.requests} --connections {arguments.connections}",
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
            "seconds": round(seconds),
            "counts": counts,
            "failures": fuzzer.failures,
        }
        arguments.out.write_text(json.dumps({"runs": [*old, entry]}, indent=1) + "\n")
    return 1 if fuzzer.failures else 0


if __name__ == "__main__":
    sys.exit(main())
