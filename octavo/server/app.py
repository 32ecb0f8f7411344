"""The application: routes to handlers.

Routes: POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/responses/{id}/cancel, /v1/embeddings,
/v1/score, /score, /v1/messages, /v1/messages/count_tokens, /tokenize, /detokenize; GET /v1/models, /v1/models/{id},
/v1/responses/{id} (DELETE, too), /health, /health/live, /health/ready, /health/progress, /metrics, /load, /server_info,
/memory, /version, /openapi.json. No documentation page: those load their scripts from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import Field
from starlette.middleware.cors import CORSMiddleware

from octavo import __version__
from octavo.errors import UnsupportedParameterError
from octavo.server import errors
from octavo.server.anthropic import CountRequest, Messages, MessagesRequest
from octavo.server.chat import chat, chat_request, prepare
from octavo.server.completions import complete
from octavo.server.door import MAX_BODY_BYTES, Door, Gate
from octavo.server.embeddings import EmbeddingRequest, ScoreRequest, embed, score
from octavo.server.front import PING_SECONDS, Caller, Front
from octavo.server.keys import Keyring
from octavo.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from octavo.server.responses import ResponsesRequest, ResponseStore, respond
from octavo.server.tools import Form

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine


ResponseId = Annotated[str, Field(max_length=256)]


def create_app(
    engine: AsyncEngine,
    *,
    served_model_names: list[str],
    max_body_bytes: int = MAX_BODY_BYTES,
    keyring: Keyring | None = None,
    allowed_origins: Sequence[str] = (),
    ping_seconds: float = PING_SECONDS,
    tool_form: Form | None = None,
    reasoning_parser: str | None = None,
) -> FastAPI:
    """The ASGI application for an engine. The first served name is the one answers carry by default.

    Args:
        engine: what generates.
        served_model_names: the names clients may ask for.
        max_body_bytes: the limit of a request's body.
        keyring: who may ask; everybody by default.
        allowed_origins: web pages ("https://example.org", or "*") whose scripts may ask; none by default.
        ping_seconds: silence in a stream after which a comment is sent, so that nobody takes it for dead.
        tool_form: how the model writes tool calls, where no grammar makes it.
        reasoning_parser: how it writes what it thinks, one of REASONING_PARSERS; None: it does not.
    """
    app = FastAPI(title="Octavo", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, keyring=keyring or Keyring(), max_body_bytes=max_body_bytes)
    if allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # clients send dozens; the origin is what decides
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(Door, metrics=engine.metrics, max_body_bytes=max_body_bytes)  # outermost
    errors.install(app)
    front = app.state.front = Front(engine, served_model_names, ping_seconds, tool_form, reasoning_parser)
    _add_generation(app, front)
    _add_responses(app, front)
    _add_anthropic(app, front)
    _add_text(app, front)
    _add_information(app, front)
    _add_health(app, front)
    return app


def _add_generation(app: FastAPI, front: Front) -> None:
    @_post(app, "/v1/chat/completions", streams=True)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await chat(front, body, front.admit(request))

    @_post(app, "/v1/completions", streams=True)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await complete(front, body, front.admit(request))

    @_post(app, "/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await embed(front, body, front.admit(request))

    @_post(app, "/score")
    @_post(app, "/v1/score")
    async def scores(body: ScoreRequest, request: Request) -> Response:
        return await score(front, body, front.admit(request))


def _add_responses(app: FastAPI, front: Front) -> None:
    store = ResponseStore()

    @_post(app, "/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return (await respond(front, store, body, front.admit(request))).answer()

    @app.get("/v1/responses/{response_id}", responses=_ERRORS)
    async def response(response_id: ResponseId, request: Request) -> Response:
        for name in request.query_params:
            raise UnsupportedParameterError(f"{name} is not supported here: leave it out", param=name)
        return _json(store.find(response_id, Caller.of(request).key.tenant).response())

    @app.delete("/v1/responses/{response_id}", responses=_ERRORS)
    async def remove(response_id: ResponseId, request: Request) -> Response:
        store.remove(store.find(response_id, Caller.of(request).key.tenant))
        return _json({"id": response_id, "object": "response", "deleted": True})

    @_post(app, "/v1/responses/{response_id}/cancel")
    async def cancel(response_id: ResponseId, request: Request) -> Response:
        job = store.find(response_id, Caller.of(request).key.tenant)
        job.cancel()
        return _json(job.response())


def _add_anthropic(app: FastAPI, front: Front) -> None:
    @_post(app, "/v1/messages", streams=True)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        job = await prepare(Messages, front, chat_request(body.as_chat()), front.admit(request), "msg_")
        return job.answer()

    @_post(app, "/v1/messages/count_tokens")
    async def count_tokens(body: CountRequest) -> Response:
        front.model(body.model)
        ids = await front.encode(await front.render(chat_request(body.as_chat())), add_special_tokens=False)
        return _json({"input_tokens": len(ids)})


def _add_text(app: FastAPI, front: Front) -> None:
    @_post(app, "/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        front.model(body.model)
        text = await front.render(body) if body.prompt is None else body.prompt
        special = body.add_special_tokens
        ids = await front.encode(text, add_special_tokens=body.messages is None if special is None else special)
        strings = [front.tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
        counts = {"count": len(ids), "max_model_len": front.engine.max_model_len}
        return _json({**counts, "tokens": ids, "token_strs": strings})

    @_post(app, "/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        front.model(body.model)
        if body.tokens:
            front.check_ids(body.tokens, "tokens")
        return _json({"prompt": front.tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _add_information(app: FastAPI, front: Front) -> None:
    engine = front.engine

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [_card(front, name) for name in front.model_names]})

    @app.get("/v1/models/{model:path}", responses=_ERRORS)
    async def model(model: Annotated[str, Field(max_length=256)]) -> Response:
        return _json(_card(front, front.model(model)))

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:
        return Response(engine.metrics.render(), media_type=engine.metrics.content_type)

    @app.get("/load")
    async def load() -> Response:
        return _json({"server_load": engine.num_unfinished})

    @app.get("/server_info")
    async def server_info() -> Response:
        return _json({"version": __version__, **engine.describe()})

    @app.get("/memory", responses=_ERRORS)
    async def memory() -> Response:
        return _json(await engine.memory())

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})


def _add_health(app: FastAPI, front: Front) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        return _json({"status": "ok"})

    @app.get("/health", responses=_ERRORS)
    @app.get("/health/ready", responses=_ERRORS)
    async def ready(request: Request) -> Response:
        failure = front.unready()
        return failure.response(request.scope) if failure else _json({"status": "ok"})

    @app.get("/health/progress")
    async def progress() -> Response:
        return _json({"progress": front.engine.progress(), "draining": front.draining})

    for path, handler in (("/health", ready), ("/health/ready", ready), ("/health/live", live)):
        app.head(path, include_in_schema=False)(handler)


def _object(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": [*fields]}


def _errors(schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    told = {"description": "Refused, or failed", "content": {"application/json": {"schema": schema}}}
    return {"4XX": told, "5XX": told}


_WORDS = {"type": "string", "maxLength": 1 << 16}
_MAYBE = {"anyOf": [_WORDS, {"type": "null"}]}
_ERRORS = _errors(_object(error=_object(message=_WORDS, type=_WORDS, param=_MAYBE, code=_MAYBE)))
_ANTHROPIC_ERRORS = _errors(
    _object(type={"const": "error"}, error=_object(type=_WORDS, message=_WORDS), request_id=_WORDS)
)
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}  # beside JSON


def _post(app: FastAPI, path: str, *, streams: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    told = _ANTHROPIC_ERRORS if path.startswith(errors.ANTHROPIC_PATH) else _ERRORS
    return app.post(path, responses={**told, **(_STREAM if streams else {})})


def _card(front: Front, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": front.created,
        "owned_by": "octavo",
        "root": front.model_names[0],
        "parent": None,
        "max_model_len": front.engine.max_model_len,
    }


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
