"""POST /v1/embeddings and /v1/score: prompts become vectors, made of the last states of the model that generates."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from octavo.errors import InvalidValueError
from octavo.sampling_params import Pooling, PoolingParams
from octavo.server.answer import Answer, merge
from octavo.server.chunks import encode
from octavo.server.front import Caller, Front
from octavo.server.protocol import EngineRequest, Prompt, StringOrList, Text, one_by_one

if TYPE_CHECKING:
    from octavo.engine.vectors import Vector

MAX_PAIRS = 256
AT_ONCE = 64  # prompts of one request that the engine is given together

Texts = StringOrList[Text, Annotated[list[Text], Field(min_length=1, max_length=MAX_PAIRS)]]


class PoolingRequest(EngineRequest):
    """What embeddings and scores share."""

    pooling: Pooling = "last"


class EmbeddingRequest(PoolingRequest):
    """Body of POST /v1/embeddings."""

    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None  # none but the model's own
    normalize: bool = True


class ScoreRequest(PoolingRequest):
    """Body of POST /v1/score: text_1 with text_2; lists in pairs, or one text with each of many."""

    text_1: Texts
    text_2: Texts


async def embed(front: Front, body: EmbeddingRequest, caller: Caller) -> Answer:
    """Checks a request and begins to embed its prompts."""
    params = PoolingParams(pooling=body.pooling, normalize=body.normalize, dimensions=body.dimensions)
    as_text = body.encoding_format == "base64"

    def shape(vectors: list[Vector]) -> list[dict[str, Any]]:
        shown = [base64.b64encode(v.astype("<f4").tobytes()).decode() if as_text else v.tolist() for v in vectors]
        return [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown)]

    return await _answer(front, body, caller, one_by_one(body.input), params, shape, "input")


async def score(front: Front, body: ScoreRequest, caller: Caller) -> Answer:
    """Checks a request and begins to compare its texts."""
    from octavo.engine.vectors import cosine

    ones, others = one_by_one(body.text_1), one_by_one(body.text_2)
    if len(ones) not in (1, len(others)):
        raise InvalidValueError(f"{len(ones)} texts cannot be paired with {len(others)}", param="text_1")

    def shape(vectors: list[Vector]) -> list[dict[str, Any]]:
        firsts, seconds = vectors[: len(ones)], vectors[len(ones) :]
        pairs = zip(firsts if len(ones) > 1 else firsts * len(seconds), seconds, strict=True)
        return [{"object": "score", "index": index, "score": cosine(*pair)} for index, pair in enumerate(pairs)]

    params = PoolingParams(pooling=body.pooling)
    return await _answer(front, body, caller, [*ones, *others], params, shape, "text_1")


async def _answer(
    front: Front,
    body: PoolingRequest,
    caller: Caller,
    prompts: list[str | list[int]],
    params: PoolingParams,
    shape: Callable[[list[Vector]], list[dict[str, Any]]],
    param: str,
) -> Answer:
    ids = [await front.prompt_ids(prompt, body, param) for prompt in prompts]
    front.max_tokens(max(map(len, ids)), 1, default=None, param=param)  # there must be room
    front.check_priority(body)
    id = f"{'embd' if param == 'input' else 'score'}-{body.request_id or caller.request_id}"
    head = {"id": id, "object": "list", "created": int(time.time()), "model": front.model(body.model)}

    sampling, key = params.as_sampling(), caller.key

    async def whole() -> AsyncGenerator[bytes, None]:
        from octavo.engine.vectors import vector_of  # numpy: without it a front starts sooner

        vectors: dict[int, Vector] = {}
        for first in range(0, len(ids), AT_ONCE):
            some = ids[first : first + AT_ONCE]
            streams = [front.generate(one, sampling, body, id, key, pooling=params.pooling) for one in some]
            async with aclosing(merge(streams)) as outputs:
                async for number, output in outputs:
                    vectors[first + number] = vector_of(output, normalize=params.normalize)
        usage = dict.fromkeys(("prompt_tokens", "total_tokens"), sum(map(len, ids)))
        yield encode({**head, "data": shape([vectors[n] for n in range(len(ids))]), "usage": usage})

    return Answer(whole(), broken=lambda failure: failure.body(), stream=False, ping_seconds=0)
