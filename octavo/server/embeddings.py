"""POST /v1/embeddings and /v1/score: prompts become vectors, made of the last states of the model that generates."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from octavo.engine.vectors import Vector, cosine, vector_of
from octavo.errors import InvalidValueError
from octavo.sampling_params import Pooling, PoolingParams
from octavo.server.answer import Answer, merge
from octavo.server.chunks import encode
from octavo.server.front import Caller, Front
from octavo.server.protocol import EngineRequest, Prompt, Text, one_by_one, string_or_list

MAX_PAIRS = 256
AT_ONCE = 64  # prompts of one request that the engine is given together

Texts = Annotated[
    Annotated[Text, Tag("<string>")] | Annotated[list[Text], Field(min_length=1, max_length=MAX_PAIRS), Tag("<list>")],
    Discriminator(string_or_list),
]


class PoolingRequest(EngineRequest):
    """What embeddings and scores share."""

    pooling: Pooling = "last"
    add_special_tokens: bool = True

    def params(self) -> PoolingParams:
        """The same as the engine knows it."""
        return PoolingParams(pooling=self.pooling)


class EmbeddingRequest(PoolingRequest):
    """Body of POST /v1/embeddings."""

    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None  # none but the model's own
    normalize: bool = True

    def params(self) -> PoolingParams:
        """The same as the engine knows it. Raises UnsupportedParameterError for `dimensions`."""
        return PoolingParams(pooling=self.pooling, normalize=self.normalize, dimensions=self.dimensions)


class ScoreRequest(PoolingRequest):
    """Body of POST /v1/score: text_1 with text_2; lists in pairs, or one text with each of many."""

    text_1: Texts
    text_2: Texts


async def embed(front: Front, body: EmbeddingRequest, caller: Caller) -> Answer:
    """Checks a request and begins to embed its prompts."""
    params = body.params()
    as_text = body.encoding_format == "base64"

    def shape(vectors: list[Vector]) -> list[dict[str, Any]]:
        shown = [base64.b64encode(v.astype("<f4").tobytes()).decode() if as_text else v.tolist() for v in vectors]
        return [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown)]

    return await _answer(front, body, caller, one_by_one(body.input), params, "embd-", "input", shape)


async def score(front: Front, body: ScoreRequest, caller: Caller) -> Answer:
    """Checks a request and begins to compare its texts."""
    ones, others = one_by_one(body.text_1), one_by_one(body.text_2)
    if len(ones) not in (1, len(others)):
        raise InvalidValueError(f"{len(ones)} texts cannot be paired with {len(others)}", param="text_1")

    def shape(vectors: list[Vector]) -> list[dict[str, Any]]:
        firsts, seconds = vectors[: len(ones)], vectors[len(ones) :]
        pairs = zip(firsts if len(ones) > 1 else firsts * len(seconds), seconds, strict=True)
        return [{"object": "score", "index": index, "score": cosine(*pair)} for index, pair in enumerate(pairs)]

    return await _answer(front, body, caller, [*ones, *others], body.params(), "score-", "text_1", shape)


async def _answer(
    front: Front,
    body: PoolingRequest,
    caller: Caller,
    prompts: list[str | list[int]],
    params: PoolingParams,
    prefix: str,
    param: str,
    shape: Callable[[list[Vector]], list[dict[str, Any]]],
) -> Answer:
    special = body.add_special_tokens
    ids = [await front.prompt_ids(prompt, body, add_special_tokens=special, param=param) for prompt in prompts]
    front.max_tokens(max(map(len, ids)), 1, default=None, param=param)  # there must be room
    front.check_priority(body)
    id = f"{prefix}{body.request_id or caller.request_id}"
    head = {
        "id": id,
        "object": "list",
        "created": int(time.time()),
        "model": front.model(body.model),
    }

    async def whole() -> AsyncGenerator[bytes, None]:
        vectors = [vector async for vector in _vectors(front, body, caller, ids, params, id)]
        num_tokens = sum(map(len, ids))
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        yield encode({**head, "data": shape(vectors), "usage": usage})

    return Answer(whole(), broken=lambda failure: failure.body(), stream=False, ping_seconds=0)


async def _vectors(
    front: Front, body: PoolingRequest, caller: Caller, prompts: list[list[int]], params: PoolingParams, id: str
) -> AsyncGenerator[Vector, None]:
    """Of each prompt, in their order."""
    sampling = params.as_sampling()
    for first in range(0, len(prompts), AT_ONCE):
        some = prompts[first : first + AT_ONCE]
        streams = [front.generate(ids, sampling, body, id, caller.key, pooling=params.pooling) for ids in some]
        found: dict[int, Vector] = {}
        async with aclosing(merge(streams)) as outputs:
            async for number, output in outputs:
                found[number] = vector_of(output, normalize=params.normalize)
        for number in range(len(some)):
            yield found[number]
