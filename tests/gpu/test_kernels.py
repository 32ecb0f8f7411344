"""Kernels one by one, with tiles so small that every loop turns, every mask cuts and every part is joined."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from octavo.program.ops import Attention, Buffer, RopeKVWrite, Rows  # noqa: E402
from octavo.runtime.cuda.fusion import find_fusion  # noqa: E402
from octavo.runtime.cuda.kernels import attention, linear, rope  # noqa: E402
from octavo.runtime.reference import compute as reference  # noqa: E402
from tests.runtime.programs import decoder_program  # noqa: E402

BLOCK = 16
HANDLE = Buffer("any", Rows.TOKENS, 1)
FP8 = torch.float8_e4m3fn


def numbers(shape, seed, device, dtype=torch.float32):
    """Seeded normal numbers, the same wherever they are drawn."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values).to(device, dtype)


def close(found, expected, tolerance):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    error = (found.float().cpu() - expected).norm() / expected.norm()
    assert error < tolerance


def paged(lengths, kv_heads, dim, device, dtype):
    """Shuffled pools whose unused positions are not numbers, and the inputs of one decode step over them."""
    width = -(-max(lengths) // BLOCK)
    ids = np.random.default_rng(1).permutation(len(lengths) * width).astype(np.int32).reshape(len(lengths), width)
    pools = []
    for seed in (2, 3):
        pool = numbers((ids.size, kv_heads, BLOCK, dim), seed, device)
        for row, length in zip(ids, lengths, strict=True):
            for at, block in enumerate(row):
                pool[int(block), :, max(min(length - at * BLOCK, BLOCK), 0) :] = float("nan")
        pools.append(pool.to(dtype))
    as_ints = [np.arange(len(lengths) + 1), np.array(lengths), ids, np.array([width]), np.arange(len(lengths))]
    starts, seq_lens, tables, stride, rows = (torch.from_numpy(a.astype(np.int32)).to(device) for a in as_ints)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    inputs = attention.AttentionInputs(
        query_start_loc=starts,
        seq_lens=seq_lens,
        tables=tables.reshape(-1),
        table_stride=stride,
        decode_rows=rows,
        tile_rows=none,
        tile_starts=none,
        num_requests=len(lengths),
        num_decodes=len(lengths),
        num_tiles=0,
    )
    return inputs, pools


def expected_attention(node, q, pools, inputs):
    """The reference's attention over the same pool."""
    keys, values = (
        np.nan_to_num(p.float().cpu().numpy()).transpose(0, 2, 1, 3).reshape(-1, node.num_kv_heads, node.head_dim)
        for p in pools
    )
    count = inputs.num_requests
    step = SimpleNamespace(
        query_start_loc=inputs.query_start_loc.cpu().numpy(),
        seq_lens=np.maximum(inputs.seq_lens.cpu().numpy(), 1),
        block_tables=inputs.tables.cpu().numpy().reshape(1, count, -1),
    )
    heads = q.float().cpu().numpy().reshape(-1, node.num_heads, node.head_dim)
    out = reference.attention(
        heads, keys, values, step, group=0, block_size=BLOCK, scale=node.scale, window=node.window, cap=node.softcap
    )
    return out.reshape(len(out), -1)


def make_partials(count, heads, dim, splits, device):
    """Room for what the parts leave, filled with what is no number."""
    rows = count * heads * splits
    return attention.Partials(
        torch.full((rows * dim,), float("nan"), device=device),
        torch.full((rows,), float("nan"), device=device),
        torch.zeros(count * heads, dtype=torch.int32, device=device),
    )


DECODES = {  # heads, KV heads, head size, splits, options
    "whole": (4, 2, 16, 1, {}),
    "in parts": (4, 2, 16, 3, {}),
    "in parts, window, odd head": (3, 1, 20, 4, {"window": 37}),
    "in parts, soft-cap, one query head": (2, 2, 32, 2, {"softcap": 3.0}),
}


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, FP8], ids=["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("name", DECODES)
def test_decode_attention(device, name, kept):
    heads, kv_heads, dim, splits, options = DECODES[name]
    lengths = [1, 0, 70, 16, 33]
    inputs, pools = paged(lengths, kv_heads, dim, device, kept)
    computed = torch.float32 if kept is torch.float32 else torch.bfloat16
    q = numbers((len(lengths), heads * dim), 4, device, computed)
    node = Attention("attention", HANDLE, HANDLE, 0, heads, kv_heads, dim, scale=dim**-0.5, **options)
    out, partials = torch.full_like(q, float("nan")), make_partials(len(lengths), heads, dim, splits, device)
    for _ in range(2):  # the counts of who has arrived are zero again
        attention.decode_attention(
            inputs, node, 0, q, *pools, out, partials, tile=attention.DecodeTile(16, 4, 2), splits=splits, min_chunk=16
        )
    expected = expected_attention(node, q, pools, inputs)
    expected[1] = 0  # a padding row
    close(out, expected, 1e-5 if kept is torch.float32 else 1e-2)
    assert not partials.arrived.any()
    assert bool(partials.sums.isnan().all()) == (splits == 1)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, FP8], ids=["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(4, 2, 16, 0), (3, 1, 20, 21)])
def test_prefill_attention(device, kept, heads, kv_heads, dim, window):
    counts, lengths = [33, 5, 20], [33, 50, 71]
    inputs, pools = paged(lengths, kv_heads, dim, device, kept)
    tile = attention.PrefillTile(rows=16, keys=16, warps=4, stages=1)
    queries = tile.rows // (heads // kv_heads)
    tiles = [(row, first) for row, count in enumerate(counts) for first in range(0, count, queries)]
    rows, starts = torch.tensor(tiles, dtype=torch.int32, device=device).T.contiguous()
    inputs.query_start_loc = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=device)
    inputs.tile_rows, inputs.tile_starts, inputs.num_tiles = rows, starts, len(tiles)
    computed = torch.float32 if kept is torch.float32 else torch.bfloat16
    q = numbers((sum(counts), heads * dim), 4, device, computed)
    out = torch.full_like(q, float("nan"))
    node = Attention("attention", HANDLE, HANDLE, 0, heads, kv_heads, dim, scale=dim**-0.5, window=window)
    attention.prefill_attention(inputs, node, 0, q, *pools, out, tile=tile)
    close(out, expected_attention(node, q, pools, inputs), 1e-5 if kept is torch.float32 else 1e-2)


def test_scales_of_the_cache_multiply_keys_and_values(device):
    inputs, pools = paged([40, 7], 2, 16, device, FP8)
    q = numbers((2, 64), 5, device, torch.bfloat16)
    node = Attention("attention", HANDLE, HANDLE, 0, 4, 2, 16, scale=0.25)
    out, partials = torch.empty_like(q), make_partials(2, 4, 16, 1, device)
    attention.decode_attention(inputs, node, 0, q, *pools, out, partials, kv_scales=(2.0, 0.5), splits=1)
    doubled = Attention("attention", HANDLE, HANDLE, 0, 4, 2, 16, scale=0.5)
    close(out, expected_attention(doubled, q, pools, inputs) * 0.5, 1e-2)


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_no_thread_of_a_tile_is_without_a_column(num_rows, gated):
    for num_out in (64, 576, 2048, 4096, 32000):
        for num_in in (20, 32, 50, 576, 1024, 2048, 4096, 8192, 11008):
            tile = linear.tile_of(num_rows, num_out, num_in, gated=gated)
            assert 32 * tile.warps <= max(tile.cols, 32) < 2 * max(num_in, 32)


@pytest.mark.parametrize(
    ("depth", "tile"), [(50, linear.Tile(4, 32, 1)), (1100, linear.Tile(2, 1024, 4)), (2100, None)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "activation"), [(1, "none"), (1, "silu_mul"), (2, "gelu_tanh_mul"), (2, "none")])
def test_few_rows_with_norm_and_residual(device, dtype, num_rows, activation, depth, tile):
    stacked = 38 if activation.endswith("_mul") else 19
    x, weight = numbers((num_rows + 1, depth), 1, device, dtype), numbers((stacked, depth), 2, device, dtype)
    bias, norm_weight = numbers((stacked,), 3, device), numbers((depth,), 4, device)
    residual = numbers((num_rows + 1, 19), 5, device, dtype)
    x32, w32, expected = (t.float().cpu().numpy() for t in (x, weight, residual))
    normed = reference.rms_norm(x32, norm_weight.cpu().numpy(), 1e-5)
    product = normed @ w32.T * np.float32(0.5) + bias.cpu().numpy()
    expected[:num_rows] += reference.activate(product, activation)[:num_rows]  # the row behind them stays as it is
    fused = linear.Fused(norm_weight, 1e-5, residual)
    linear.few_rows(
        num_rows, x, weight, bias, residual, activation=activation, scale=0.5, softcap=0.0, fused=fused, tile=tile
    )
    close(residual, expected, 1e-5 if dtype is torch.float32 else 1e-2)


def test_fp8_cache_saturates_and_rounds_to_nearest(device):
    qkv = numbers((3, 3 * 16), 6, device, torch.bfloat16)
    qkv[1, 16:20] = torch.tensor([1e4, -1e4, 448.0, 1e-4])
    pools = [torch.zeros(2, 1, BLOCK, 16, device=device).to(FP8) for _ in range(2)]
    q, slots = torch.empty(3, 16, device=device, dtype=torch.bfloat16), torch.tensor([3, 17, 31], dtype=torch.int32)
    node = RopeKVWrite("rope", HANDLE, HANDLE, 0, 1, 1, 16)
    positions = torch.zeros(3, dtype=torch.int32, device=device)
    rope.rope_kv_write(3, node, qkv, positions, slots.to(device), None, None, q, *pools, kv_scales=(2.0, 1.0))
    rows = qkv.float().cpu().numpy()
    for pool, part, scale in zip(pools, (rows[:, 16:32], rows[:, 32:]), (2.0, 1.0), strict=True):
        kept = pool.float().cpu().numpy().transpose(0, 2, 1, 3).reshape(-1, 16)[slots.numpy()]
        nearest = reference.round_to_e4m3(part / np.float32(scale))
        if device == "cpu":  # the interpreter sometimes takes a neighbour
            np.testing.assert_allclose(kept, nearest, rtol=0.13, atol=2**-6)
            assert (kept == nearest).mean() > 0.8
        else:
            np.testing.assert_array_equal(kept, nearest)


def test_the_reference_rounds_to_e4m3_as_torch_does():
    x = np.random.default_rng(0).standard_normal(4096).astype(np.float32) * np.float32(2) ** np.arange(-12, 4).repeat(
        256
    )
    x = np.concatenate((x, np.linspace(-448, 448, 999, dtype=np.float32)))
    np.testing.assert_array_equal(reference.round_to_e4m3(x), torch.from_numpy(x).to(FP8).float().numpy())


def test_norms_of_a_decoder_go_to_their_products():
    program = decoder_program()
    fusion = find_fusion(program)
    assert [n.label for n in fusion.norm_of.values()] == ["norm", "0.norm2", "1.norm", "1.norm2"]  # all but the last
    assert [n.label for n in fusion.norm_of] == ["qkv", "gate_up", "qkv", "gate_up"]
    assert [n.label for n in fusion.residual_of] == ["o", "down", "o"]
