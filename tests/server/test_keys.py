"""Keys: every route asks for one, each is held to its limits, tenants share nothing, and files are read strictly."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from inside import Inside
from live_server import Server

from octavo.errors import ConfigError, StepError
from octavo.server import door
from octavo.server.keys import ADMIN_PATHS, PROBE_PATHS, Allowance, KeyEntry, Keyring, read_keys
from octavo.server.loop import Tls

ALICE, BOB, ADMIN = "alice-0123456789", "bob-0123456789ab", "admin-0123456789"
COMPLETION = {"prompt": "ab", "max_tokens": 4}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ring(**kwargs: object) -> Keyring:
    entries = [KeyEntry(ALICE, "alice"), KeyEntry(BOB, "bob"), KeyEntry(ADMIN, "root", admin=True)]
    return Keyring(entries, **kwargs)


def routes(ask: Inside) -> list[tuple[str, str]]:
    """Every method and path that the application serves, documented or not."""
    found = [(method, route.path.replace(":path}", "}")) for route in ask.app.routes for method in route.methods]
    assert {path for _, path in found} >= {*ask.app.openapi()["paths"], "/openapi.json"}
    return found


def test_every_route_asks_for_a_key() -> None:
    ask = Inside(keyring=ring())
    found = routes(ask)
    assert len(found) >= 10
    for method, path in [*found, ("GET", "/nothing"), ("DELETE", "/v1/models"), ("OPTIONS", "/v1/models")]:
        for headers in ({}, bearer("wrong-0123456789"), bearer(""), bearer(ALICE[:-1]), {"Authorization": ALICE}):
            answer = ask(method, path, headers=headers)
            assert answer.status_code == 401, (method, path, headers)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]
            error = {} if method == "HEAD" else answer.json()["error"]
            assert method == "HEAD" or error["type"] == "authentication_error"
            assert error.get("code", "invalid_api_key") == "invalid_api_key"  # Anthropic's shape has none
    assert not ask.engine.seen


def test_a_key_opens_every_route_but_the_administrators() -> None:
    ask = Inside(keyring=ring())
    for method, path in routes(ask):
        expected = {403} if path in ADMIN_PATHS else {200, 400, 404, 405}
        assert ask(method, path, headers=bearer(ALICE)).status_code in expected, (method, path)
        assert ask(method, path, headers=bearer(ADMIN)).status_code in {200, 400, 404, 405}, (method, path)
    assert {path for _, path in routes(ask)} >= ADMIN_PATHS | PROBE_PATHS
    assert ask("GET", "/v1/models", headers={"x-api-key": BOB}).status_code == 200
    assert ask("GET", "/metrics", headers=bearer(ALICE)).json()["error"]["type"] == "permission_error"


def test_without_keys_everything_is_open() -> None:
    ask = Inside()
    assert ask("GET", "/metrics").status_code == 200
    assert ask("POST", "/v1/completions", json=COMPLETION).status_code == 200
    assert ask.engine.seen[0].cache_salt is None


def test_probes_may_be_public() -> None:
    ask = Inside(keyring=ring(public_probes=True))
    assert ask("GET", "/health").status_code == 200
    assert ask("GET", "/v1/models").status_code == 401


def test_tenants_share_no_prefixes() -> None:
    ask = Inside(keyring=ring())
    for key in (ALICE, BOB):
        for salt in (None, "x"):
            ask("POST", "/v1/completions", json={**COMPLETION, "cache_salt": salt}, headers=bearer(key))
    assert len({call.cache_salt for call in ask.engine.seen}) == 4


def test_an_allowance_refills_and_carries_debt() -> None:
    now = 0.0
    allowance = Allowance(60, lambda: now)
    assert allowance.wait(1) == 0
    allowance.take(90)
    assert allowance.wait(1) == pytest.approx(31)
    now = 31.0
    assert allowance.wait(1) == pytest.approx(0)
    now = 1000.0
    assert allowance.wait(60) == 0, "a minute's worth, and no more"
    assert allowance.wait(61) == pytest.approx(1)


def test_requests_per_minute() -> None:
    entry = KeyEntry(ALICE, requests_per_minute=2)
    ask = Inside(keyring=Keyring([entry, KeyEntry(BOB)]), headers=bearer(ALICE))
    statuses = [ask("POST", "/v1/completions", json=COMPLETION).status_code for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    refused = ask("POST", "/v1/completions", json=COMPLETION)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert ask("GET", "/v1/models").status_code == 200, "looking is free"
    assert ask("POST", "/v1/completions", json=COMPLETION, headers=bearer(BOB)).status_code == 200
    assert len(ask.engine.seen) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_per_minute_count_prompts_and_answers(stream: bool) -> None:
    """A prompt of three tokens and four generated: the second request finds 2 of 9 left, the third a debt of 5."""
    ask = Inside(keyring=Keyring([KeyEntry(ALICE, tokens_per_minute=9)]), headers=bearer(ALICE))
    body = {**COMPLETION, "stream": stream}
    answers = [ask("POST", "/v1/completions", json=body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 20 <= int(answers[2].headers["retry-after"]) <= 40, "a debt of 5, and one to begin with, at 0.15 a second"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_an_answer_that_ends_early_are_counted(stream: bool) -> None:
    """Three tokens of the prompt and two of an answer that then fails: 5 of 5, whoever reads them."""
    engine = FakeEngine(fail_after=2, failure=StepError("a test"))
    ask = Inside(engine, keyring=Keyring([KeyEntry(ALICE, tokens_per_minute=5)]), headers=bearer(ALICE))
    body = {**COMPLETION, "n": 1, "stream": stream}
    assert ask("POST", "/v1/completions", json=body).status_code == (200 if stream else 500)
    assert ask("POST", "/v1/completions", json=body).status_code == 429


def test_keys_come_from_flags_and_files(tmp_path: Path) -> None:
    toml = tmp_path / "keys.toml"
    toml.write_text(
        f'[[key]]\nkey = "{ALICE}"\ntenant = "alice"\nweight = 2.5\nrequests_per_minute = 60\n\n'
        f'[[key]]\nkey = "{ADMIN}"\nadmin = true\n'
    )
    both = read_keys([BOB], (), toml)
    ask = Inside(keyring=both)
    assert ask("GET", "/metrics", headers=bearer(ADMIN)).status_code == 200
    assert ask("GET", "/version", headers=bearer(BOB)).status_code == 200
    found = both.check("/v1/models", httpx_headers(ALICE))
    assert (found.tenant, found.weight) == ("alice", 2.5)
    same = tmp_path / "keys.json"
    same.write_text(json.dumps({"key": [{"key": ALICE, "tenant": "alice"}]}))
    assert read_keys(path=same).check("/", httpx_headers(ALICE)).tenant == "alice"


def httpx_headers(key: str):
    from starlette.datastructures import Headers

    return Headers(bearer(key))


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("keys.txt", ALICE, "must end in .toml or .json"),
        ("keys.toml", "key = 5", "Expected `array`"),
        ("keys.toml", "[[key]]\nkey = ", "Invalid value"),
        ("keys.toml", "[[key]]\nkey = 'short'", "matching regex"),
        ("keys.toml", f"[[key]]\nkey = '{ALICE}'\nwieght = 2", "wieght"),
        ("keys.toml", f"[[key]]\nkey = '{ALICE}'\nweight = 0", ">= 0.01"),
        ("keys.toml", f"[[key]]\nkey = '{ALICE}'\ntenant = 'a/b'", "matching regex"),
        ("keys.json", '{"key": []}', "length >= 1"),
        ("missing.toml", None, "No such file"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, name: str, text: str | None, word: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=word) as caught:
        read_keys(path=tmp_path / name)
    assert ALICE not in str(caught.value).replace(name, "")


def test_bad_and_double_keys_are_refused_unseen() -> None:
    for bad in ("short", "a" * 257, "with space in the middle", "ümlaut-0123456789"):
        with pytest.raises(ConfigError, match="16 to 256") as caught:
            read_keys([bad])
        assert bad not in str(caught.value)
    with pytest.raises(ConfigError, match="twice"):
        read_keys([ALICE], [ALICE])


def test_cors_is_off_unless_asked_for() -> None:
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    closed = Inside()
    assert closed("OPTIONS", "/v1/completions", headers=preflight).status_code == 405
    assert "access-control-allow-origin" not in closed("GET", "/version", headers=preflight).headers
    ask = Inside(keyring=ring(), allowed_origins=["https://a.example"])
    allowed = ask("OPTIONS", "/v1/completions", headers=preflight)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://a.example")
    for sent in ("authorization, content-type, x-stainless-lang", "anthropic-version, x-api-key", "x-request-id"):
        asked = ask("OPTIONS", "/v1/messages", headers={**preflight, "Access-Control-Request-Headers": sent})
        assert (asked.status_code, asked.headers["access-control-allow-headers"]) == (200, sent)
    refused = ask("GET", "/v1/models", headers=preflight)
    assert refused.status_code == 401, "a page needs a key like everybody"
    assert refused.headers["access-control-allow-origin"] == "https://a.example", "and may read why it was refused"
    other = ask("OPTIONS", "/v1/completions", headers={**preflight, "Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls(serve, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    command = ["openssl", "req", "-x509", *kind, *names, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    server = serve(loop={"tls": Tls(cert, key)})
    context = ssl.create_default_context(cafile=str(cert))
    answer = httpx.get(f"https://127.0.0.1:{server.port}/health", verify=context)
    assert answer.status_code == 200
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{server.port}/health")
    with pytest.raises(ConfigError, match="--ssl-keyfile"):
        Tls(key, cert)


def test_half_open_connections_are_closed(serve) -> None:
    """One sends nothing, one a head without an end, byte by byte; a running answer is not touched."""
    server: Server = serve(loop={"head_seconds": 1.0})  # ours sends its head in that time on any machine
    server.engine.token_seconds = 0.5
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address, timeout=60) as silent, socket.create_connection(address, timeout=60) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
        answer = server.http.post("/v1/completions", json={"prompt": "ab", "max_tokens": 5})
        assert answer.status_code == 200
        assert ended(silent)
        assert ended(slow)


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(("between", "whole"), [(0.3, 60.0), (60.0, 0.3)])
def test_a_body_that_comes_too_slowly_is_hung_up_on(serve, monkeypatch, between: float, whole: float) -> None:
    """Nothing more of it comes, or for ever another byte in time."""
    monkeypatch.setattr(door, "BODY_SECONDS", between)
    monkeypatch.setattr(door, "WHOLE_BODY_SECONDS", whole)
    server: Server = serve()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow:
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 9999"]
        slow.sendall("\r\n".join([*head, "\r\n"]).encode())
        stopped = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not stopped.wait(0.02):
                    slow.sendall(b" ")

        writer = threading.Thread(target=trickle)
        if whole < between:
            writer.start()
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # what it still sends is not read
            while part := slow.recv(1 << 16):
                answer += part
        stopped.set()
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in answer.lower()
    if whole < between:
        writer.join()
    assert not server.engine.seen
