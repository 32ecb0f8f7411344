"""Each kernel of the cuda runtime alone, against the card's own limits: part of tools/gpu_check.py.

The limits (read rate, rate of a large bf16 product) are measured first, in the same process; `percent` is of the one
that binds. Shapes are those of a 0.6B, a 7B and a grouped-query 8B model, and of other head sizes. Inputs rotate where
they would fit the card's cache; where even ten sets do (`in_l2`), the rate is that of the cache. That results are right
is shown by tests/gpu, against the reference.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

DEVICE = "cuda"
Report = Callable[..., None]
LINEARS = [
    *((4096, 1024, "none"), (1024, 2048, "none"), (3072, 1024, "silu_mul"), (1024, 3072, "none")),
    *((151936, 1024, "none"), (12288, 4096, "none"), (4096, 4096, "none"), (11008, 4096, "silu_mul")),
    *((4096, 11008, "none"), (32000, 4096, "none"), (6144, 4096, "none"), (14336, 4096, "silu_mul")),
    *((4096, 14336, "none"), (128256, 4096, "none"), (2048, 2048, "none")),
]
TILES = [  # outputs, columns of a turn, warps
    *((1, 1024, 2), (1, 1024, 4), (1, 2048, 2), (1, 2048, 4), (2, 512, 1), (2, 1024, 1), (2, 2048, 2), (2, 2048, 4)),
    *((2, 4096, 4), (4, 1024, 1)),
]
DECODES = [  # requests, heads, KV heads, head size, context
    *((1, 16, 8, 128, 192), (1, 32, 32, 128, 192), (1, 32, 8, 128, 8000), (8, 16, 8, 128, 600)),
    *((64, 32, 32, 128, 1100), (256, 16, 8, 128, 800), (256, 32, 32, 128, 800), (256, 32, 8, 128, 800)),
    *((256, 9, 3, 64, 800), (64, 16, 4, 256, 1100), (64, 32, 8, 96, 1100)),
]
PREFILLS = [(4, 16, 8, 128, 2048), (4, 32, 32, 128, 2048), (1, 32, 8, 128, 8192), (8, 9, 3, 64, 1024)]


def time_kernels(report: Report, guarded: Callable[[str, Callable[[], None]], None]) -> dict[str, float]:
    """Reports one line for each kernel and shape; returns the card's limits."""
    limits: dict[str, float] = {}
    guarded("limits", lambda: limits.update(measure_limits(report)))
    for shape in LINEARS:
        guarded("linear", lambda s=shape: time_linear(report, limits, 1, *s))
    guarded("linear", lambda: time_linear(report, limits, 2, 11008, 4096, "silu_mul"))
    for shape in DECODES:
        for kv in ("bfloat16", "float8_e4m3fn"):
            guarded("decode", lambda s=shape, k=kv: time_decode(report, limits, k, *s))
    for shape in PREFILLS:
        guarded("prefill", lambda s=shape: time_prefill(report, limits, *s))
    for rows, width in [(1, 1024), (256, 4096), (8192, 4096)]:
        guarded("norm", lambda r=rows, w=width: time_norms(report, limits, r, w))
    return limits


def timed(function: Callable[[int], None], num_sets: int = 1, repeat: int = 20) -> float:
    """Median seconds of one call, from replays of a graph of ten; `function(i)` works on input set i % num_sets."""
    import torch

    for i in range(max(num_sets, 2)):
        function(i % num_sets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(10):
            function(i % num_sets)
    seconds = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / 10)
    return statistics.median(seconds)


def measure_limits(report: Report) -> dict[str, float]:
    """TB/s of reading weights once (the best of our products, and of a sum), TFLOP/s of a large product."""
    import torch

    from octavo.runtime.cuda.kernels.linear import few_rows

    weight, x = (torch.randn(n, 4096, device=DEVICE, dtype=torch.bfloat16) for n in (128256, 1))
    out = torch.empty(1, 128256, device=DEVICE, dtype=torch.bfloat16)
    read = weight.numel() * 2 / timed(lambda _: few_rows(1, x, weight, None, out), repeat=5) / 1e12
    summed = weight.numel() * 2 / timed(lambda _: torch.sum(weight, 1), repeat=5) / 1e12
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / timed(lambda _: torch.mm(a, b), repeat=3) / 1e12
    limits = {"tbs": max(read, summed), "tflops": product}
    report("limits", card=torch.cuda.get_device_name(), read_tbs=limits["tbs"], sum_tbs=summed, mm_tflops=product)
    return limits


def time_linear(
    report: Report, limits: dict[str, float], rows: int, num_out: int, num_in: int, activation: Any
) -> None:
    """Our few-row kernel, alone and behind another, and cuBLAS without the activation; weights come from memory."""
    import torch

    from octavo.runtime.cuda.kernels.linear import few_rows
    from octavo.runtime.cuda.launches import can_chain

    stacked = num_out * (2 if activation.endswith("_mul") else 1)
    num_bytes = stacked * num_in * 2
    sets = sets_for(num_bytes)
    weights = [torch.randn(stacked, num_in, device=DEVICE, dtype=torch.bfloat16) for _ in range(sets)]
    x = torch.randn(rows, num_in, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty(rows, num_out, device=DEVICE, dtype=torch.bfloat16)
    product = torch.empty(rows, stacked, device=DEVICE, dtype=torch.bfloat16)
    alone, behind = (
        timed(lambda i, c=chained: few_rows(rows, x, weights[i], None, out, activation=activation, chained=c), sets)
        for chained in (False, can_chain(torch.device(DEVICE)))
    )
    blas = timed(lambda i: torch.mm(x, weights[i].t(), out=product), sets)
    rate = num_bytes / behind / 1e12
    report(
        f"linear {rows}x{num_in}->{stacked}", us=behind * 1e6, alone_us=alone * 1e6, cublas_us=blas * 1e6, tbs=rate,
        percent=100 * rate / limits["tbs"],
    )  # fmt: skip


def time_tiles(report: Report) -> None:
    """TB/s of products of one and two rows in every tile of TILES; `chosen` is what tile_of() takes."""
    import torch

    from octavo.runtime.cuda.kernels.linear import Tile, few_rows, tile_of

    for rows in (1, 2):
        for num_out, num_in, activation in [*LINEARS, (8192, 2048, "silu_mul"), (2048, 8192, "none")]:
            gated = activation.endswith("_mul")
            num_bytes = num_out * num_in * (4 if gated else 2)
            sets = sets_for(num_bytes)
            shape = (num_out * (2 if gated else 1), num_in)
            weights = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(sets)]
            x = torch.randn(rows, num_in, device=DEVICE, dtype=torch.bfloat16)
            out = torch.empty(rows, num_out, device=DEVICE, dtype=torch.bfloat16)
            rates = {}
            for tile in [*(Tile(*t) for t in TILES if t[1] < 2 * num_in), tile_of(rows, num_out, num_in, gated=gated)]:
                options = {"activation": activation, "chained": True, "tile": tile}
                s = timed(lambda i, w=weights, x=x, o=out, k=options: few_rows(len(x), x, w[i], None, o, **k), sets)
                rates[f"{tile.rows}x{tile.cols}/{tile.warps}"] = num_bytes / s / 1e12
            report(f"tiles {rows} {num_in}->{shape[0]}", chosen=rates[f"{tile.rows}x{tile.cols}/{tile.warps}"], **rates)


def attention_inputs(
    lengths: list[int], queries: list[int], heads: int, kv_heads: int, dim: int, tile: int = 1
) -> tuple[Any, ...]:
    """A paged pool with shuffled blocks in bf16, the inputs of a step over it in tiles of queries, and the node."""
    import numpy as np
    import torch

    from octavo.program.ops import Attention, Buffer, Rows
    from octavo.runtime.base import SamplingInputs, StepInputs
    from octavo.runtime.cuda.staging import Settings, Staging, send_step

    width = -(-max(lengths) // 16)
    num_blocks = sum(-(-n // 16) for n in lengths)
    ids = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    tables = np.zeros((1, len(lengths), width), np.int32)
    used = 0
    for row, n in enumerate(lengths):
        count = -(-n // 16)
        tables[0, row, :count] = ids[used : used + count]
        used += count
    num_tokens = sum(queries)
    starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
    zeros = np.zeros(num_tokens, np.int32)
    inputs = StepInputs(
        zeros, zeros, zeros.astype(np.int64)[None], starts, np.array(lengths, np.int32), tables, starts[1:] - 1
    )
    device = torch.device(DEVICE)
    staging = Staging(Staging.capacity(num_tokens, len(lengths), len(lengths), 1, width), 1, device)
    sampling = SamplingInputs.greedy(len(lengths))
    step = send_step(staging, inputs, sampling, Settings(sampling, 0), tile_queries=tile)
    pools = [torch.randn(num_blocks, kv_heads, 16, dim, device=device, dtype=torch.bfloat16) for _ in range(2)]
    q = torch.randn(num_tokens, heads * dim, device=device, dtype=torch.bfloat16)
    handle = Buffer("q", Rows.TOKENS, heads * dim)
    node = Attention("attention", handle, handle, 0, heads, kv_heads, dim, scale=dim**-0.5)
    return step.attention, node, q, pools, torch.empty_like(q)


def sets_for(num_bytes: int) -> int:
    """Of how many sets of inputs timing must choose in turn, so that none is found in the card's cache."""
    return max(1, min(10, (200 << 20) // num_bytes + 1))


def time_decode(
    report: Report,
    limits: dict[str, float],
    kv: str,
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    length: int,
) -> None:
    """One layer's decode attention, Triton's and the C++ one; K and V come from memory, unless `in_l2` says so."""
    import torch

    from octavo.runtime.cuda import build, operators
    from octavo.runtime.cuda.kernels import attention

    inputs, node, q, pools, out = attention_inputs([length] * batch, [1] * batch, heads, kv_heads, dim)
    rows = attention.partial_rows(batch, heads, kv_heads)
    arrived = torch.zeros(batch * kv_heads, device=DEVICE, dtype=torch.int32)
    partials = attention.Partials(torch.empty(rows * dim, device=DEVICE), torch.empty(rows, device=DEVICE), arrived)
    moved = 2 * batch * length * kv_heads * dim * getattr(torch, kv).itemsize
    count = sets_for(moved)
    sets = [[pool.roll(i, 0).to(getattr(torch, kv)) for pool in pools] for i in range(count)]
    values: dict[str, Any] = {}
    decodes: dict[str, Any] = {"": attention.decode_attention}
    if build.find_nvcc() and operators.can_decode(node, 16, sets[0][0].element_size()):
        decodes["cpp_"] = operators.decode_attention
    for name, decode in decodes.items():
        s = timed(lambda i, d=decode: d(inputs, node, 0, q, *sets[i], out, partials), count)
        rate = moved / s / 1e12
        values |= {f"{name}us": s * 1e6, f"{name}tbs": rate, f"{name}percent": 100 * rate / limits["tbs"]}
    report(f"decode b{batch} h{heads}/{kv_heads}x{dim} len{length} {kv}", in_l2=count * moved < 50e6, **values)


def time_prefill(
    report: Report, limits: dict[str, float], count: int, heads: int, kv_heads: int, dim: int, length: int
) -> None:
    """One layer's prefill attention, Triton's and the C++ one, and torch's over contiguous K and V for comparison."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from octavo.runtime.cuda import build, operators
    from octavo.runtime.cuda.kernels import attention

    work, group = 4 * count * heads * dim * length * (length + 1) / 2, heads // kv_heads
    prefills: dict[str, Any] = {"": (attention.prefill_attention, attention.queries_per_tile(dim, group, 2))}
    if build.find_nvcc():
        prefills["cpp_"] = (operators.prefill_attention, operators.PREFILL_ROWS // group)
    values: dict[str, Any] = {}
    for name, (prefill, tile) in prefills.items():
        inputs, node, q, pools, out = attention_inputs([length] * count, [length] * count, heads, kv_heads, dim, tile)
        if name and not operators.can_prefill(node, 16, 2):
            continue
        s = timed(lambda _, p=prefill, i=inputs, n=node, x=(q, *pools, out): p(i, n, 0, *x), repeat=5)
        rate = work / s / 1e12
        values |= {f"{name}us": s * 1e6, f"{name}tflops": rate, f"{name}percent": 100 * rate / limits["tflops"]}
    rows = [
        torch.randn(count, length, n, dim, device=DEVICE, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
    ]
    each = [t.transpose(1, 2) for t in rows]
    attend = torch.nn.functional.scaled_dot_product_attention
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            s = timed(lambda _: attend(*each, is_causal=True, enable_gqa=heads != kv_heads), repeat=5)
        values[f"{name}_tflops"] = work / s / 1e12
    report(f"prefill {count}x{length} h{heads}/{kv_heads}x{dim}", **values)


def time_norms(report: Report, limits: dict[str, float], rows: int, width: int) -> None:
    """RMS norm with residual; LayerNorm with residual and bias + GELU, Triton's and the C++ ones."""
    import torch

    from octavo.runtime.cuda import build, operators
    from octavo.runtime.cuda.kernels.rows import epilogue, norm

    sets = sets_for(6 * rows * width)
    tensors = [torch.randn(sets, rows, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    xs, residuals, outs = (list(t) for t in tensors)
    weight, bias = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    moved, plain = 4 * rows * width * 2, {"scale": 1.0, "softcap": 0.0}
    runs: dict[str, tuple[int, Callable[[int], None], Callable[[int], None] | None]] = {
        "rms norm": (
            moved,
            lambda i: norm(rows, xs[i], residuals[i], weight, None, outs[i], residuals[i], eps=1e-5, is_layer=False),
            None,
        ),
        "layer norm": (
            moved,
            lambda i: norm(rows, xs[i], residuals[i], weight, bias, outs[i], residuals[i], eps=1e-5, is_layer=True),
            lambda i: operators.layer_norm(xs[i], residuals[i], weight, bias, outs[i], residuals[i], 1e-5, rows, False),
        ),
        "layer norm + gelu": (
            moved // 2,
            lambda i: (
                norm(rows, xs[i], None, weight, bias, outs[i], None, eps=1e-5, is_layer=True),
                epilogue(rows, outs[i], None, outs[i], activation="gelu", **plain),
            )[0],
            lambda i: operators.layer_norm(xs[i], None, weight, bias, outs[i], None, 1e-5, rows, True),
        ),
        "bias + gelu": (
            moved // 2,
            lambda i: epilogue(rows, xs[i], bias, outs[i], activation="gelu", **plain),
            lambda i: operators.bias_gelu(xs[i], bias, outs[i], rows, False),
        ),
    }  # fmt: skip
    for name, (size, triton_run, cpp_run) in runs.items():
        s = timed(triton_run, sets)
        values = {"us": s * 1e6, "tbs": size / s / 1e12, "percent": size / s / 1e10 / limits["tbs"]}
        if cpp_run is not None and build.find_nvcc():
            values["cpp_us"] = timed(cpp_run, sets) * 1e6
        report(f"{name} {rows}x{width}", in_l2=sets * size < 50e6, **values)
