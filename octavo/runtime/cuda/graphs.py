"""CUDA graphs of steps: one replay instead of hundreds of launches. One for each padded shape and way to end the step.

Decode steps have a bucket of batch sizes. Steps with prompts in them have one of tokens and one of rows, up to a size
from which on the device takes longer than the host needs to launch them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

GREEDY, DRAWS, LOGITS = "greedy", "draws", "logits"  # how a step ends: the largest, a draw, or the logits alone
MOST_MIXED_TOKENS = 2048
_MIXED_ROWS = (16, 64)  # and the most there may be
_LAUNCHED_IN = 0.012  # seconds that the host takes to launch a step piece by piece
_OPERATIONS = 4e14  # a second, of a large card at such products


class Shape(NamedTuple):
    """What a captured step is padded to. A decode has as many tokens as rows; in a mixed step the rows are requests."""

    num_tokens: int
    num_rows: int
    is_decode: bool


Key = tuple[Shape, str]


def mixed_shape(num_tokens: int, num_requests: int, max_tokens: int, max_rows: int) -> Shape | None:
    """The padded shape of a step with prompts: at least one token more, which padding requests may point at.

    None where it is too large to be captured.
    """
    step = 64 if num_tokens < 512 else 128 if num_tokens < 1024 else 256
    size = (num_tokens // step + 1) * step
    if size > max_tokens:
        return None
    return Shape(size, next((n for n in _MIXED_ROWS if num_requests <= n <= max_rows), max_rows), is_decode=False)


def mixed_sizes(max_tokens: int) -> list[int]:
    """Every number of tokens that mixed_shape() gives."""
    shapes = (mixed_shape(n, 1, max_tokens, 1) for n in range(max_tokens))
    return sorted({shape.num_tokens for shape in shapes if shape is not None})


def most_mixed_tokens(num_weights: int) -> int:
    """Tokens from which on a step takes the device longer than its launches take the host: padding would be a loss."""
    return min(int(_LAUNCHED_IN * _OPERATIONS / (2 * max(num_weights, 1))), MOST_MIXED_TOKENS)


def mixed_rows(max_rows: int) -> list[int]:
    """Every number of rows that mixed_shape() gives."""
    return [n for n in _MIXED_ROWS if n < max_rows] + [max_rows]


def bucket_of(num_rows: int, max_rows: int) -> int:
    """The padded batch size: 1, 2, 4, 8, 16, 32, 48, 64, then steps of 32 up to 256 and of 64 beyond; at most
    `max_rows`. Where weights or their tiles of rows bound a step, padding costs next to nothing."""
    if num_rows <= 16:
        size = 1 << max(num_rows - 1, 0).bit_length()
    else:
        step = 16 if num_rows <= 64 else 32 if num_rows <= 256 else 64
        size = -(-num_rows // step) * step
    return min(size, max_rows)


def buckets(max_rows: int) -> list[int]:
    """Every bucket, the largest first."""
    return sorted({bucket_of(n, max_rows) for n in range(1, max_rows + 1)}, reverse=True)


class Graphs:
    """Start-up captures all that plain decode steps use, so serving does not wait for it; the rest when first needed.

    All graphs share one memory pool. Buffers, inputs and weights lie outside it, at fixed addresses, so what a graph
    itself holds is cuBLAS's workspace.
    """

    def __init__(self) -> None:
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the default stream cannot be captured

    def __contains__(self, key: Key) -> bool:
        return key in self._graphs

    def replay(self, key: Key) -> None:
        """Runs a graph on the inputs that lie at its addresses."""
        self._graphs[key].replay()

    def capture(self, key: Key, launch: Callable[[], None]) -> None:
        """Records what `launch` launches; nothing runs. All of it must be compiled and loaded."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):  # torch.cuda.graph() would also wait and collect garbage, each time
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        self._graphs[key] = graph

    def clear(self) -> None:
        """Drops all graphs: what they hold addresses of has moved."""
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # the old one ended with the last of them
