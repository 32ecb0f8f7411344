"""CUDA graphs of decode steps: one replay instead of hundreds of launches. One graph for each bucket of batch sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch


def bucket_of(num_rows: int, max_rows: int) -> int:
    """The padded batch size: 1, 2, 4, 8, then multiples of 8, at most `max_rows`."""
    size = 1 << max(num_rows - 1, 0).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8
    return min(size, max_rows)


def buckets(max_rows: int) -> list[int]:
    """Every bucket, the largest first."""
    return sorted({bucket_of(n, max_rows) for n in range(1, max_rows + 1)}, reverse=True)


class Graphs:
    """A graph is captured when a step of its bucket first runs, which start-up sees to: serving never waits for it.

    All graphs share one memory pool. Buffers, inputs and weights lie outside it, at fixed addresses, so what a graph
    itself holds is cuBLAS's workspace.
    """

    def __init__(self) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the default stream cannot be captured

    def __contains__(self, bucket: int) -> bool:
        return bucket in self._graphs

    def replay(self, bucket: int) -> None:
        """Runs the bucket's graph on the inputs that lie at its addresses."""
        self._graphs[bucket].replay()

    def capture(self, bucket: int, launch: Callable[[], None]) -> None:
        """Records what `launch` launches; nothing runs. It must have run before, so that everything is compiled."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):  # torch.cuda.graph() would also collect garbage, each time
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        self._graphs[bucket] = graph
