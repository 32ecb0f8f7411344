"""The CPU workloads as token ids: every engine gets the same work from the same seeds.

Every repetition draws fresh prompts, so that a prefix cache never sees a prompt twice except where W4 wants it to;
lengths stay the same. Repetition -1 is the warm-up. Prompts are random ids, or windows of a text's ids where one is
given.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

LOW, HIGH = 100, 48000  # plain text tokens of SmolLM2's vocabulary of 49,152
W2_CONCURRENCY = 32
LONG_PROMPT, LONG_OUT = 7936, 64


@dataclass(frozen=True, slots=True)
class Work:
    """One request: prompt ids, and how many tokens to generate (end-of-sequence is ignored)."""

    prompt: list[int]
    num_out: int


def w1(repetition: int = 0, text: Sequence[int] | None = None) -> list[Work]:
    """One stream: 128 in, 128 out."""
    return [Work(_ids(random.Random(1000 + repetition), 128, text), 128)]


def w2(repetition: int = 0, text: Sequence[int] | None = None) -> list[Work]:
    """64 requests, input and output lengths uniform in 32 to 256; 32 at once."""
    lengths = random.Random(0)
    sizes = [(lengths.randint(32, 256), lengths.randint(32, 256)) for _ in range(64)]
    rng = random.Random(2000 + repetition)
    return [Work(_ids(rng, num_in, text), num_out) for num_in, num_out in sizes]


def w3(repetition: int = 0) -> list[Work]:
    """Prefill: 1,024 in, 1 out."""
    return [Work(_ids(random.Random(3000 + repetition), 1024), 1)]


def w4(repetition: int = 0) -> list[Work]:
    """32 requests at once: a shared prefix of 512 and 32 own tokens in, 32 out."""
    rng = random.Random(4000 + repetition)
    prefix = _ids(rng, 512)
    return [Work(prefix + _ids(rng, 32), 32) for _ in range(32)]


def long_context(repetition: int = 0) -> list[Work]:
    """One stream at the end of 8,192 tokens of context."""
    return [Work(_ids(random.Random(5000 + repetition), LONG_PROMPT), LONG_OUT)]


def _ids(rng: random.Random, count: int, text: Sequence[int] | None = None) -> list[int]:
    if text is None:
        return [rng.randrange(LOW, HIGH) for _ in range(count)]
    start = rng.randrange(len(text) - count)
    return list(text[start : start + count])
