"""CUDA graphs of decode steps: one replay instead of hundreds of launches. One graph for each bucket of batch sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.runtime.cuda.staging import DeviceStep


def bucket_of(num_rows: int, max_rows: int) -> int:
    """The padded batch size: 1, 2, 4, 8, then multiples of 8, at most `max_rows`."""
    size = 1 << max(num_rows - 1, 0).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8
    return min(size, max_rows)


class Graphs:
    """Captured lazily: the first step of a bucket runs eagerly (which compiles what it needs), the rest replay.

    All graphs share one memory pool. Buffers, inputs and weights lie outside it, at fixed addresses, so what a graph
    itself holds is cuBLAS's workspace.
    """

    def __init__(self) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, bucket: int, step: DeviceStep, launches: Callable[[DeviceStep], None]) -> None:
        """Replays the bucket's graph; without one yet, runs the step and captures it."""
        graph = self._graphs.get(bucket)
        if graph is not None:
            graph.replay()
            return
        launches(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            launches(step)
        self._graphs[bucket] = graph
