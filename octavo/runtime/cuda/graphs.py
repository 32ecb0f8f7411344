"""CUDA graphs of decode steps: one replay instead of hundreds of launches. One for each bucket of batch sizes and way
to end the step."""

from __future__ import annotations

from collections.abc import Callable

import torch

GREEDY, DRAWS, LOGITS = "greedy", "draws", "logits"  # how a step ends: the largest, a draw, or the logits alone
Key = tuple[int, str]


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

    def __len__(self) -> int:
        return len(self._graphs)

    def replay(self, key: Key) -> None:
        """Runs a graph on the inputs that lie at its addresses."""
        self._graphs[key].replay()

    def capture(self, key: Key, launch: Callable[[], None]) -> None:
        """Records what `launch` launches; nothing runs. All of it must be compiled and loaded."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):  # torch.cuda.graph() would also collect garbage, each time
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
