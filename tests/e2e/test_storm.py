"""Two hundred clients at once, half of which leave in mid-stream: nobody else notices, no block is lost."""

import asyncio
import random

import pytest
from serving import serving

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.model

NUM_CLIENTS = 200
POOL_TOKENS = 2048  # far less than the clients want at once, so that preemption happens as well
ANIMALS = ["cat", "dog", "fox", "owl", "hen"]
PROMPTS = [f"Story number {i}. Once upon a time there was a {animal}" for i, animal in enumerate(ANIMALS)]


async def one(client, number, leave_after):
    """Streams one answer; leaves after so many characters. Returns the text, or None if it left."""
    stream = await client.completions.create(
        model="smollm2",
        prompt=PROMPTS[number % len(PROMPTS)],
        max_tokens=10 + number % 30,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = ""
    async for chunk in stream:
        text += chunk.choices[0].text
        if leave_after is not None and len(text) > leave_after:  # a slow client gets few chunks, but the same text
            await stream.close()
            return None
    return text


async def storm(url):
    rng = random.Random(0)
    leaves = [rng.randrange(0, 20) if rng.random() < 0.5 else None for _ in range(NUM_CLIENTS)]
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        texts = await asyncio.gather(*(one(client, i, leave) for i, leave in enumerate(leaves)))
        alone = {}
        for i, leave in enumerate(leaves):
            key = (i % len(PROMPTS), i % 30)
            if leave is None and key not in alone and len(alone) < 6:
                alone[key] = await one(client, i, None)
        whole_pool = await client.completions.create(
            model="smollm2",
            prompt=[100] * (POOL_TOKENS - 2),
            max_tokens=2,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
    return leaves, texts, alone, whole_pool.usage


def test_disconnects_harm_nobody_and_leak_nothing():
    arguments = ["--max-model-len", str(POOL_TOKENS), "--num-gpu-blocks-override", str(POOL_TOKENS // 16)]
    with serving("smollm2", *arguments) as server:
        leaves, texts, alone, usage = asyncio.run(storm(server.url))
        assert server.stop() == 0
    finished = [text for text, leave in zip(texts, leaves, strict=True) if leave is None]
    assert len(finished) > 60
    assert all(finished), "every client that stayed got its answer"
    assert sum(text is None for text in texts) > 40, "clients did leave in mid-stream"
    for i, (text, leave) in enumerate(zip(texts, leaves, strict=True)):
        key = (i % len(PROMPTS), i % 30)
        if leave is None and key in alone:
            assert text == alone[key], "an answer given in the storm differs from the same one given alone"
    assert usage.completion_tokens == 2, "a request that needs every block of the pool can still run"
