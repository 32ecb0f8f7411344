"""Which prefixes should stay? The two eviction policies on the same streams of prompts, counted in tokens.

    python -m lab.eviction                 writes lab/results/prefix-eviction.json

No model runs: the KV cache manager is asked as the scheduler asks it, with 16 requests alive at a time. Streams:

    assistants   system prompts of 300 to 1,500 tokens, chosen by Zipf's law, and a question of its own
    chats        conversations whose every turn brings all turns before it; 40 at a time, and they end
    documents    assistants, but every third prompt is a document of 3,000 tokens that comes once
    shifting     assistants whose order of popularity is drawn again every 1,000 prompts

The pool holds a share of all distinct prompt blocks of the stream. The figure is tokens hit, of tokens asked for.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from octavo.kvcache.eviction import EVICTIONS
from octavo.kvcache.manager import KVCacheManager
from octavo.request import Request
from octavo.sampling_params import SamplingParams

NUM_PROMPTS = 4000
BLOCK_SIZE = 16
ALIVE = 16  # requests
POOLS = (0.02, 0.05, 0.1, 0.25)  # of the distinct blocks
RESULT = Path(__file__).parent / "results" / "prefix-eviction.json"
Prompt = list[int]


def fresh(draw: random.Random, count: int) -> Prompt:
    """Tokens that nobody else has."""
    return [draw.randrange(1 << 31) for _ in range(count)]


def assistants(draw: random.Random, *, documents: bool = False, shifting: bool = False) -> Iterator[Prompt]:
    """Shared system prompts."""
    systems = [fresh(draw, draw.randrange(300, 1500)) for _ in range(200)]
    weights = [1 / rank for rank in range(1, len(systems) + 1)]
    for number in itertools.count():
        if shifting and number % 1000 == 0:
            draw.shuffle(systems)
        if documents and number % 3 == 0:
            yield fresh(draw, 3000)
        else:
            yield draw.choices(systems, weights)[0] + fresh(draw, draw.randrange(20, 200))


def chats(draw: random.Random) -> Iterator[Prompt]:
    """Conversations that grow by a question and an answer a turn."""
    live = [fresh(draw, 200) for _ in range(40)]
    while True:
        index = draw.randrange(len(live))
        live[index] = live[index] + fresh(draw, draw.randrange(50, 400))
        yield live[index]
        if draw.random() < 0.15:
            live[index] = fresh(draw, 200)


STREAMS: dict[str, Callable[[random.Random], Iterator[Prompt]]] = {
    "assistants": lambda draw: assistants(draw),
    "chats": chats,
    "documents": lambda draw: assistants(draw, documents=True),
    "shifting": lambda draw: assistants(draw, shifting=True),
}


def hit_share(prompts: list[Prompt], num_blocks: int, policy: str) -> float:
    """Tokens found, of tokens looked up."""
    kv = KVCacheManager(num_blocks, BLOCK_SIZE, hash_key=b"lab", eviction=EVICTIONS[policy]())
    params, alive = SamplingParams(), deque[Request]()
    hits = asked = 0
    for number, prompt in enumerate(prompts):
        request = Request(str(number), prompt, params, frozenset(), 1, 0.0)
        kv.add(request)
        while True:
            found = kv.lookup(request)
            if kv.try_allocate(request, request.num_tokens, found) is not None:
                break
            kv.forget(alive.popleft())
        kv.hash_full(request, request.num_tokens)
        hits, asked = hits + len(found[0]) * BLOCK_SIZE, asked + request.num_tokens
        alive.append(request)
        if len(alive) > ALIVE:
            kv.forget(alive.popleft())
    return hits / asked


def distinct_blocks(prompts: list[Prompt]) -> int:
    """Blocks that a pool without an end would hold."""
    return len(
        {tuple(p[: i + BLOCK_SIZE][-64:]) for p in prompts for i in range(0, len(p) - BLOCK_SIZE + 1, BLOCK_SIZE)}
    )


def main() -> None:
    """Prints the table and writes it."""
    argparse.ArgumentParser(prog="python -m lab.eviction", description=__doc__).parse_args()
    rows = []
    print(f"{'stream':<12} {'pool':>6} {'blocks':>8} {'lru':>8} {'lfu':>8}")
    for name, stream in STREAMS.items():
        prompts = list(itertools.islice(stream(random.Random(0)), NUM_PROMPTS))
        total = distinct_blocks(prompts)
        for share in POOLS:
            num_blocks = max(int(total * share), 1200)
            shares = {policy: round(hit_share(prompts, num_blocks, policy), 4) for policy in EVICTIONS}
            rows.append({"stream": name, "pool_share": share, "num_blocks": num_blocks, **shares})
            print(f"{name:<12} {share:>6.0%} {num_blocks:>8,} {shares['lru']:>8.1%} {shares['lfu']:>8.1%}", flush=True)
    saved = {"command": "python -m lab.eviction", "date": datetime.date.today().isoformat(), "rows": rows}
    RESULT.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
