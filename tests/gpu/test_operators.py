"""The CUDA C++ operators against the reference, and what their build says where it cannot be done."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from octavo.errors import ConfigError, UnsupportedError  # noqa: E402
from octavo.program.ops import Attention, Linear, Norm, Rope, RopeKVWrite  # noqa: E402
from octavo.runtime.cuda import build, operators  # noqa: E402
from octavo.runtime.cuda.kernels.rope import rope_kv_write  # noqa: E402
from octavo.runtime.cuda.packing import rope_tables  # noqa: E402
from octavo.runtime.cuda.runtime import CudaRuntime  # noqa: E402
from octavo.runtime.reference import ReferenceRuntime  # noqa: E402
from octavo.runtime.reference import compute as reference  # noqa: E402
from tests.gpu.test_kernels import FP8, HANDLE, close, expected_attention, make_partials, numbers, paged  # noqa: E402
from tests.runtime.programs import Piece, Steps, load, matrix, row_program, run, vector  # noqa: E402


def test_without_a_compiler_the_flag_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "absent.so")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no nvcc found.*leave out --cuda-ops"):
        build.built_library()


def test_the_flag_is_refused_where_no_operator_computes():
    with pytest.raises(UnsupportedError, match="bfloat16, not float32"):
        CudaRuntime("float32", cuda_ops="cuda", device="cpu")


SHAPES = [(4, 4, 128, 0, 0.0), (8, 2, 128, 70, 0.0), (16, 2, 128, 0, 5.0), (4, 1, 256, 0, 0.0), (6, 2, 64, 0, 0.0)]
TYPES = {"bfloat16": torch.bfloat16, "fp8": FP8}


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("warps", [4, 8, 16])
@pytest.mark.parametrize(
    ("kept", "heads", "kv_heads", "dim", "window", "softcap"),
    [(kept, *shape) for kept in TYPES for shape in SHAPES if (kept, shape[2]) != ("fp8", 64)],
)
def test_decode_attention(device, monkeypatch, kept, splits, warps, heads, kv_heads, dim, window, softcap):
    monkeypatch.setattr(operators, "decode_warps", lambda _: warps)
    lengths, kept = [1, 0, 300, 16, 133, 800], TYPES[kept]
    node = Attention("attention", HANDLE, HANDLE, 0, heads, kv_heads, dim, dim**-0.5, window, softcap)
    assert operators.can_decode(node, 16, kept.itemsize)
    inputs, pools = paged(lengths, kv_heads, dim, device, kept)
    q = numbers((len(lengths), heads * dim), 4, device, torch.bfloat16)
    out, partials = torch.full_like(q, float("nan")), make_partials(len(lengths), heads, dim, splits, device)
    for _ in range(2):
        operators.decode_attention(inputs, node, 0, q, *pools, out, partials, splits=splits, min_chunk=64)
    expected = expected_attention(node, q, pools, inputs)
    expected[1] = 0  # a padding row
    close(out, expected, 1e-2)
    assert not partials.arrived.any()
    assert bool(partials.sums.isnan().all()) == (splits == 1)


@pytest.mark.gpu
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(("splits", "length"), [(1, 1), (1, 77), (4, 300), (4, 289)])
@pytest.mark.parametrize(
    ("kept", "heads", "kv_heads", "dim", "window"),
    [("bfloat16", 4, 4, 128, 0), ("bfloat16", 16, 2, 128, 0), ("bfloat16", 6, 2, 64, 70), ("fp8", 8, 2, 128, 0)],
)
def test_decode_attention_turns_the_heads_of_a_lone_token(
    device, splits, length, has_norms, chained, kept, heads, kv_heads, dim, window
):
    """What rope_kv_write() and it would do one after the other, the cache included."""
    node = Attention("attention", HANDLE, HANDLE, 0, heads, kv_heads, dim, dim**-0.5, window)
    turned = RopeKVWrite("rope", HANDLE, HANDLE, 0, heads, kv_heads, dim, eps=1e-5)
    inputs, pools = paged([length], kv_heads, dim, device, TYPES[kept])
    table = rope_tables(Rope(tuple(100.0 ** (-i / (dim // 2)) for i in range(dim // 2))), 512, torch.device(device))
    norms = (numbers((dim,), 5, device), numbers((dim,), 6, device)) if has_norms else None
    positions = torch.tensor([length - 1], dtype=torch.int32, device=device)
    slots = (inputs.tables[(length - 1) // 16] * 16 + (length - 1) % 16).reshape(1)
    qkv = numbers((1, (heads + 2 * kv_heads) * dim), 4, device, torch.bfloat16)
    for pool in pools:
        pool[slots // 16, :, slots % 16] = torch.tensor(float("nan"), device=device).to(pool.dtype)
    pools_after = [pool.clone() for pool in pools]
    q = torch.empty(1, heads * dim, device=device, dtype=torch.bfloat16)
    rope_kv_write(1, turned, qkv, positions, slots, table, norms, q, *pools_after)
    expected = torch.empty_like(q)
    partials = make_partials(1, heads, dim, splits, device)
    options = {"splits": splits, "min_chunk": 64, "chained": chained}
    operators.decode_attention(inputs, node, 0, q, *pools_after, expected, partials, **options)
    out = torch.full_like(q, float("nan"))
    turn = operators.Turn(positions, slots, table, norms, turned.eps)
    operators.decode_attention(inputs, node, 0, qkv, *pools, out, partials, **options, turn=turn)
    close(out, expected.float().cpu().numpy(), 1e-2)
    for pool, after in zip(pools, pools_after, strict=True):
        pool, after = pool.float(), after.float()
        close(torch.nan_to_num(pool), torch.nan_to_num(after).cpu().numpy(), 1e-2)
        assert torch.equal(pool.isnan(), after.isnan()), "written elsewhere"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(2, 2, 128), (16, 8, 128), (16, 2, 128), (9, 3, 64), (8, 8, 64), (7, 1, 128)]
)
def test_prefill_attention(device, heads, kv_heads, dim):
    """Prompts, chunks behind a prefix, lengths at and around the edges of pages and tiles, and a padding request."""
    counts, lengths = [300, 5, 128, 129, 200, 0, 2, 400], [300, 50, 128, 257, 712, 0, 1024, 400]
    node = Attention("attention", HANDLE, HANDLE, 0, heads, kv_heads, dim, scale=dim**-0.5)
    if not operators.can_prefill(node, 16, 2):
        pytest.skip("written for Hopper")
    inputs, pools = paged(lengths, kv_heads, dim, device, torch.bfloat16)
    queries = operators.PREFILL_ROWS // (heads // kv_heads)
    tiles = [(row, first) for row, count in enumerate(counts) for first in range(0, count, queries)]
    tiles.append((5, 0))
    rows, starts = torch.tensor(tiles, dtype=torch.int32, device=device).T.contiguous()
    inputs.query_start_loc = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=device)
    inputs.tile_rows, inputs.tile_starts, inputs.num_tiles = rows, starts, len(tiles)
    q = numbers((sum(counts) + 1, heads * dim), 4, device, torch.bfloat16)
    out = torch.full_like(q, float("nan"))
    for _ in range(2):
        operators.prefill_attention(inputs, node, 0, q, *pools, out)
    close(out[:-1], expected_attention(node, q[:-1], pools, inputs), 1e-2)
    assert out[-1].isnan().all(), "a row behind the last"


@pytest.mark.parametrize(
    ("rows", "num_out", "expected"),
    [(2048, 6144, True), (1536, 6144, False), (8192, 4096, True), (64, 4096, False), (256, 22016, False)],
)
def test_products_are_taken_where_the_last_round_of_tiles_is_nearly_full(monkeypatch, rows, num_out, expected):
    monkeypatch.setattr(operators, "_num_multiprocessors", lambda: 132)
    assert operators.fills(rows, num_out) == expected


@pytest.mark.parametrize(
    ("num_out", "depth", "expected"),
    [
        (12288, 4096, (64, 1)),
        (4096, 4096, (64, 2)),
        (22016, 4096, (128, 2)),
        (4096, 1024, (64, 1)),
        (1024, 3072, (64, 4)),
        (1024, 1024, (64, 4)),
    ],
)
def test_streamed_tiles_fill_the_card(monkeypatch, num_out, depth, expected):
    monkeypatch.setattr(operators, "_num_multiprocessors", lambda: 132)
    operators.streamed_tile.cache_clear()
    assert operators.streamed_tile(num_out, depth) == expected
    operators.streamed_tile.cache_clear()


@pytest.mark.gpu
def test_product_by_the_fastest_of_the_kernels_that_cublas_offers(device):
    x = numbers((48, 520), 1, device, torch.bfloat16)
    weight = numbers((1040, 520), 2, device, torch.bfloat16) * 520**-0.5
    out = torch.full((49, 1040), float("nan"), device=device, dtype=torch.bfloat16)
    assert not operators.multiply(x, weight, out[:48]), "nobody measured it"
    assert operators.multiply(x, weight, out[:48], measures=True)
    out.fill_(float("nan"))
    assert operators.multiply(x, weight, out[:48])
    assert not operators.multiply(x[:47], weight, out[:47])
    close(out[:48], (x.float() @ weight.float().T).cpu().numpy(), 5e-3)
    assert out[48:].isnan().all(), "a row behind the last"


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(64, 1), (64, 4), (128, 2), (128, 1), (128, 4)])
@pytest.mark.parametrize("activation", ["none", "silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize(
    ("rows", "width", "depth"), [(3, 8, 8), (17, 136, 72), (64, 1032, 2048), (90, 640, 1096), (128, 3072, 1024)]
)
def test_streamed_product(device, monkeypatch, rows, width, depth, activation, tile):
    """Every number of rows that has a kernel, at and around the edges of tiles, parts of the depth without a step."""
    stacked = width * (1 if activation == "none" else 2)
    node = Linear("linear", HANDLE, matrix("w", stacked, depth), HANDLE, None, activation)
    if stacked % 16 or not operators.can_multiply(node):
        pytest.skip("written for Hopper")
    monkeypatch.setattr(operators, "streamed_tile", lambda *_: tile)
    x = numbers((rows + 3, depth), 1, device, torch.bfloat16)
    weight = numbers((stacked, depth), 2, device, torch.bfloat16) * depth**-0.5
    offset = numbers((stacked,), 3, device) if rows % 2 else None
    out = torch.full((rows + 3, width), float("nan"), device=device, dtype=torch.bfloat16)
    product = operators.Product(node, x, weight, offset, out, chained=True)
    for _ in range(3):
        product.stream(rows)
    expected = (x[:rows].float() @ weight.float().T + (0 if offset is None else offset)).cpu().numpy()
    if activation != "none":
        gate, up = expected.reshape(rows, 2, -1).swapaxes(0, 1)
        act = reference.silu if activation == "silu_mul" else reference.gelu_tanh
        expected = act(np.ascontiguousarray(gate)) * up
    close(out[:rows], expected, 5e-3)
    assert out[rows:].isnan().all(), "a row behind the last"


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 8, 8), (300, 136, 72), (257, 3072, 1024), (2600, 1032, 512)])
def test_gated_product_of_many_rows(device, rows, width, depth, activation, bias):
    """Sizes within a tile, at and around the edges of tiles, more tiles than programs, and padding behind the rows."""
    node = Linear("linear", HANDLE, matrix("w", 2 * width, depth), HANDLE, None, activation)
    if not operators.can_multiply(node):
        pytest.skip("written for Hopper")
    x = numbers((rows + 3, depth), 1, device, torch.bfloat16)
    weight = numbers((2 * width, depth), 2, device, torch.bfloat16) * depth**-0.5
    offset = numbers((2 * width,), 3, device) if bias else None
    out = torch.full((rows + 3, width), float("nan"), device=device, dtype=torch.bfloat16)
    product = operators.Product(node, x, weight, offset, out)
    for _ in range(2):
        product.launch(rows)
    gate, up = (
        (x[:rows].float() @ weight.float().T + (offset if bias else 0))
        .cpu()
        .numpy()
        .reshape(rows, 2, -1)
        .swapaxes(0, 1)
    )
    act = reference.silu if activation == "silu_mul" else reference.gelu_tanh
    close(out[:rows], act(np.ascontiguousarray(gate)) * up, 5e-3)
    assert out[rows:].isnan().all(), "a row behind the last"


@pytest.mark.gpu
@pytest.mark.parametrize("kept", TYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rows", [1, 300, 2600])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 1, 128), (16, 8, 128), (9, 3, 64), (3, 3, 64)])
def test_product_that_turns_its_heads(device, heads, kv_heads, dim, rows, norms, kept):
    """Against the product in float32, and what the Triton kernel for heads does with it."""
    depth, width = 200, (heads + 2 * kv_heads) * dim
    rope = Rope(tuple(10000.0 ** (-2 * i / dim) for i in range(dim // 2)))
    linear = Linear("qkv", HANDLE, matrix("w", width, depth), HANDLE)
    node = RopeKVWrite("rope", HANDLE, HANDLE, 0, heads, kv_heads, dim, rope)
    if not operators.can_multiply(linear):
        pytest.skip("written for Hopper")
    rng = np.random.default_rng(0)
    x = numbers((rows + 3, depth), 1, device, torch.bfloat16)
    weight, bias = numbers((width, depth), 2, device, torch.bfloat16), numbers((width,), 3, device)
    table = rope_tables(rope, 500, torch.device(device))
    weights = tuple(numbers((dim,), seed, device) for seed in (4, 5)) if norms else None
    positions = torch.from_numpy(rng.integers(0, 500, rows).astype(np.int32)).to(device)
    slots = torch.from_numpy(rng.permutation(rows + 40)[:rows].astype(np.int32)).to(device)
    blocks = -(-(rows + 40) // 16)

    def pools(dtype):
        return [torch.zeros((blocks, kv_heads, 16, dim), device=device).to(dtype) for _ in range(2)]

    out = torch.full((rows + 3, heads * dim), float("nan"), device=device, dtype=torch.bfloat16)
    found, wanted = pools(TYPES[kept]), pools(FP8 if kept == "fp8" else torch.float32)
    q = torch.zeros(rows, heads * dim, device=device)
    product = operators.Product(linear, x, weight, bias, out, heads=node, table=table, norms=weights)
    for _ in range(2):
        product.place(positions, slots, *found)
        product.launch(rows)
    qkv = x[:rows].float() @ weight.float().T + bias
    rope_kv_write(rows, node, qkv, positions, slots, table, weights, q, *wanted)
    close(out[:rows], q.cpu(), 5e-3)
    for pool, expected in zip(found, wanted, strict=True):
        close(pool, expected.float().cpu(), 3e-2 if kept == "fp8" else 5e-3)  # a few of 256 values are a neighbour
    assert out[rows:].isnan().all(), "a row behind the last"


@pytest.mark.gpu
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("width", [40, 4096])
def test_layer_norm(device, width, with_gelu):
    x, residual = (numbers((5, width), seed, device, torch.bfloat16) for seed in (1, 2))
    weight, bias = numbers((width,), 3, device), numbers((width,), 4, device)
    out, kept = torch.zeros_like(x), torch.zeros_like(x)
    operators.layer_norm(x, residual, weight, bias, out, kept, 1e-5, 4, with_gelu)
    total = (x.float() + residual.float()).cpu().numpy()[:4]
    expected = reference.layer_norm(total, weight.cpu().numpy(), bias.cpu().numpy(), 1e-5)
    close(out[:4], reference.gelu(expected) if with_gelu else expected, 1e-2)
    close(kept[:4], total, 1e-2)
    assert not out[4].any()
    assert not kept[4].any()


@pytest.mark.gpu
@pytest.mark.parametrize("by_tanh", [False, True])
def test_bias_gelu(device, by_tanh):
    x, bias = numbers((7, 264), 1, device, torch.bfloat16), numbers((264,), 2, device)
    out = torch.zeros_like(x)
    operators.bias_gelu(x, bias, out, 6, by_tanh)
    total = x.float().cpu().numpy()[:6] + bias.cpu().numpy()
    close(out[:6], (reference.gelu_tanh if by_tanh else reference.gelu)(total), 1e-2)
    assert not out[6].any()


@pytest.mark.gpu
def test_the_runtime_takes_them_by_its_flag(device, monkeypatch):
    def body(build, x):
        normed, out = build.tokens("normed", 48), build.tokens("out", 64)
        build.add(Norm("norm", x, vector("weight", 48), normed, 1e-5, "layer", vector("bias", 48)))
        build.add(Linear("linear", normed, matrix("w", 64, 48), out, vector("b", 64), "gelu_tanh"))
        return out

    called = []
    for name in ("layer_norm", "bias_gelu"):
        original = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *a, f=original, n=name: (called.append(n), f(*a)))
    program, steps = row_program(48, body), Steps()
    inputs = steps.inputs([Piece(0, 0, 9)])
    expected = run(load(ReferenceRuntime(), program, steps=steps), inputs)
    found = run(load(CudaRuntime("bfloat16", cuda_ops="cuda"), program, dtype="bfloat16", steps=steps), inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-2 * np.abs(expected).max())
    assert {"layer_norm", "bias_gelu"} <= set(called)
