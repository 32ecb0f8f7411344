"""What the fuzzer sends (fuzz_server.py): right requests for each route, and how they are made wrong.

Each is drawn from (seed, number) alone: values are replaced by hostile ones, fields left out, doubled, renamed and
invented, bytes flipped, cut and repeated, or the HTTP around them broken.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from tools.wire import request

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
            "messages": [SYSTEM, USER],
            "stream": True,
            "logprobs": True,
            "top_logprobs": 2,
            **SAMPLING,
        },
        {"messages": [USER], "tools": [TOOL], "tool_choice": "required", "max_tokens": 5, "parallel_tool_calls": False},
        {
            "messages": [
                USER,
                CALLED,
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
    "n", "stream", "model", "prompt", "messages", "__proto__", "constructor", "user", "logprobs", "echo", "suffix",
    "x" * 300,
]  # fmt: skip
GETS = [
    "/v1/models", "/v1/models/tiny", "/health", "/health/live", "/health/progress", "/metrics", "/load", "/server_info",
    "/version", "/openapi.json", "/", "/v1/../health", "/%00", "/v1/models/%ff%fe", "/v1/models/" + "a" * 3000,
]  # fmt: skip


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


class Requests:
    """Draws requests; `document` is the server's OpenAPI file, of which routes that have no seed get one."""

    def __init__(self, seed: int, document: dict[str, Any]) -> None:
        self.seed = seed
        self.bodies = copy.deepcopy(SEEDS)
        for path, methods in document["paths"].items():
            content = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
            if content and path not in self.bodies:
                self.bodies[path] = [example(content["schema"], document)]

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
