"""The cuda runtime against the reference, op by op and as whole decoders, in ragged, mixed and chunked steps."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from octavo.errors import MemoryPlanError, UnsupportedError  # noqa: E402
from octavo.program.ops import Add, Embedding, Experts, Linear, Norm  # noqa: E402
from octavo.runtime.base import SamplingInputs  # noqa: E402
from octavo.runtime.cuda import operators  # noqa: E402
from octavo.runtime.cuda.graphs import GREEDY, Shape, mixed_shape, mixed_sizes  # noqa: E402
from octavo.runtime.cuda.kernels import sampling as sampling_kernels  # noqa: E402
from octavo.runtime.cuda.runtime import CudaRuntime  # noqa: E402
from octavo.runtime.cuda.staging import Settings, Staging, padded_views, send_padded, send_step  # noqa: E402
from octavo.runtime.reference import ReferenceRuntime  # noqa: E402
from tests.runtime.programs import (  # noqa: E402
    MAX_TOKENS,
    Piece,
    RandomWeights,
    Steps,
    attention_program,
    decoder_program,
    load,
    matrix,
    row_program,
    run,
    sampling,
    vector,
)

TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "fp8": 0.1}  # of the largest logit
CHUNKS = [[Piece(0, 0, 18), Piece(1, 0, 1)], [Piece(0, 18, 1), Piece(1, 1, 19), Piece(2, 0, 2)], [Piece(0, 19, 1)]]
SMALL = {"hidden": 32, "heads": 2, "kv_heads": 1, "dim": 16, "inner": 24}  # the interpreter is slow
LONG = [[Piece(0, 0, 150)], [Piece(0, 150, 149), Piece(1, 0, 5)], [Piece(0, 299, 1), Piece(1, 5, 1), Piece(2, 0, 1)]]


def compare(device, program, plan, *, dtype="float32", kv=None, steps=None, logits="all", **options):
    """Runs the same steps on both and compares all logits; returns the runtime."""
    steps = steps or Steps()
    reference = load(ReferenceRuntime(), program, dtype=dtype, kv=kv, steps=steps)
    found = load(CudaRuntime(dtype, device=device, **options), program, dtype=dtype, kv=kv, steps=steps)
    for pieces in plan:
        inputs = steps.inputs(pieces, logits)
        want, got = run(reference, inputs), run(found, inputs)
        scale = float(np.abs(want).max())
        assert scale > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[kv or dtype] * scale)
    return found


def body_linear(width, bias, activation, softcap=0.0, scale=1.0):
    def body(build, x):
        rows = width * (2 if activation.endswith("_mul") else 1)
        out = build.tokens("y", width)
        weight, offset = matrix("w", rows, x.width), vector("b", rows) if bias else None
        build.add(Linear("linear", x, weight, out, offset, activation, softcap, scale))
        return out

    return body


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 3, 7])
@pytest.mark.parametrize(
    ("activation", "bias", "softcap", "scale"),
    [
        ("none", False, 0.0, 1.0),
        ("silu_mul", True, 0.0, 1.0),
        ("gelu", True, 2.0, 0.5),
        ("gelu_tanh_mul", False, 0.0, 1.0),
    ],
)
def test_linear_at_every_number_of_rows(device, dtype, num_rows, activation, bias, softcap, scale):
    program = row_program(52, body_linear(37, bias, activation, softcap, scale))
    compare(device, program, [[Piece(0, 0, num_rows)]], dtype=dtype)


def test_products_of_sampled_rows_alone_have_sizes_that_start_up_knows(device, monkeypatch):
    sizes, mm = set(), torch.mm

    def spy(x, weight, *, out):
        sizes.add(len(x))
        return mm(x, weight, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    prompts = [Piece(0, 0, 5), Piece(1, 0, 2), Piece(2, 0, 3)]
    compare(device, decoder_program(), [prompts], use_graphs=False, logits="last")
    assert {4, 10} <= sizes
    assert 3 not in sizes, "three logits are computed as four"


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_embedding_norm_and_add(device, kind):
    def body(build, x):
        normed, summed, out = (build.tokens(name, x.width) for name in ("normed", "summed", "out"))
        bias = vector("bias", x.width) if kind == "layer" else None
        build.add(Norm("norm", x, vector("weight", x.width), normed, 1e-5, kind, bias, residual=x, residual_out=summed))
        build.add(Add("add", summed, normed, out))
        return out

    positions = matrix("positions", 402, 75, "embedding")
    compare(device, row_program(75, body, scale=1.5, position_weight=positions, position_offset=2), CHUNKS[:2])


def test_positions_alone(device):
    def body(build, x):
        positions, out = build.tokens("positions", x.width), build.tokens("out", x.width)
        table = matrix("positions", 400, x.width, "embedding")
        build.add(Embedding("positions", None, positions, position_weight=table))
        build.add(Add("add", x, positions, out))
        return out

    compare(device, row_program(20, body), CHUNKS[:1])


SHAPES = {
    "grouped, qk-norm, partial rope": {"heads": 6, "kv_heads": 2, "dim": 20, "qk_norm": True, "rope": 6},
    "window and soft-cap": {"heads": 4, "kv_heads": 4, "dim": 16, "window": 9, "softcap": 5.0},
    "one KV head, no rope": {"heads": 4, "kv_heads": 1, "dim": 32, "rope": 0},
}
CARD_SHAPES = {
    "llama": {"heads": 32, "kv_heads": 32, "dim": 128},
    "qwen3": {"heads": 16, "kv_heads": 8, "dim": 128, "qk_norm": True},
    "grouped by 8, wide head, window": {"heads": 8, "kv_heads": 1, "dim": 256, "window": 100, "softcap": 30.0},
    "head of 80": {"heads": 4, "kv_heads": 4, "dim": 80},
    "head of 64": {"heads": 9, "kv_heads": 3, "dim": 64},
}


@pytest.mark.parametrize("name", SHAPES)
def test_rope_and_attention(device, name):
    compare(device, attention_program(**SHAPES[name]), CHUNKS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES | CARD_SHAPES)
def test_rope_and_attention_over_long_contexts(device, name, dtype):
    compare(device, attention_program(**(SHAPES | CARD_SHAPES)[name]), [*CHUNKS, *LONG], dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kv", [None, "fp8"])
@pytest.mark.parametrize("groups", [1, 2])
def test_products_of_many_rows_in_a_decoder(device, monkeypatch, groups, kv):
    """In steps of 150 rows the gated products and those with heads are ours; in one of 3 none."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("written for Hopper")
    kinds, launch = [], operators.Product.launch
    monkeypatch.setattr(operators, "fills", lambda num_rows, num_out: num_rows > 20)
    monkeypatch.setattr(operators.Product, "launch", lambda self, rows: (kinds.append(self._kind), launch(self, rows)))
    program = decoder_program(hidden=64, heads=4, kv_heads=2, dim=64, inner=96, groups=groups)
    compare(device, program, LONG, dtype="bfloat16", kv=kv, steps=Steps(groups=groups))
    assert kinds == [64, 1] * 4


@pytest.mark.gpu
def test_products_of_some_rows_in_a_decoder(device, monkeypatch):
    """In a step of 30 tokens three products of a layer are streamed; that of heads, and logits 61 wide, are not."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("written for Hopper")
    rows, stream = [], operators.Product.stream
    monkeypatch.setattr(operators.Product, "stream", lambda self, n: (rows.append(n), stream(self, n)))
    program = decoder_program(hidden=64, heads=4, kv_heads=2, dim=64, inner=96)
    compare(device, program, [[Piece(i, 0, 3 * i + 3) for i in range(4)]], dtype="bfloat16")
    assert rows[-6:] == [30] * 6
    assert 30 not in rows[:-6]


def test_two_kv_groups_in_a_decoder(device):
    compare(device, decoder_program(groups=2), CHUNKS[:2], steps=Steps(groups=2))


def test_bfloat16_decoder(device):
    compare(device, decoder_program(), CHUNKS[:2], dtype="bfloat16")


def test_fp8_cache_in_a_decoder(device):
    plan = [[Piece(0, 0, 18)], [Piece(0, 18, 1)]]
    runtime = compare(device, decoder_program(), plan, dtype="bfloat16", kv="fp8")
    assert {pool.dtype for pool in runtime._kv.keys} == {torch.float8_e4m3fn}
    halved = runtime.kv_bytes_per_block(decoder_program(), 16, "fp8")
    assert 2 * halved == runtime.kv_bytes_per_block(decoder_program(), 16, "bfloat16")
    with pytest.raises(UnsupportedError, match="int8"):
        runtime.kv_bytes_per_block(decoder_program(), 16, "int8")


def test_experts_are_refused_before_anything_is_packed(device):
    def body(build, x):
        weight = matrix("never read", 4, 8)
        build.add(Experts("layers.0.experts", x, x, weight, weight, x, 1, 1, renormalize=False))
        return x

    with pytest.raises(UnsupportedError, match=r"layers.0.experts: .* take --runtime native"):
        load(CudaRuntime("float32", device=device), row_program(8, body), weights=object())


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_fp8_is_refused_by_the_name_of_a_card_that_does_not_convert_it(monkeypatch, capability, is_refused):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    runtime = CudaRuntime("bfloat16", use_graphs=False, device="cuda", attention_backend="triton")
    program = decoder_program()
    if is_refused:
        with pytest.raises(UnsupportedError, match=r"A100 .*8\.9.*--kv-cache-dtype auto"):
            runtime.kv_bytes_per_block(program, 16, "fp8")
    else:
        assert runtime.kv_bytes_per_block(program, 16, "fp8") * 2 == runtime.kv_bytes_per_block(program, 16)


def test_no_room_for_graphs_is_told_as_a_plan_that_does_not_fit(monkeypatch):
    def capture(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    runtime = CudaRuntime("float32", use_graphs=False, device="cuda")
    runtime._limits = (64, 4, 4)
    monkeypatch.setattr(runtime, "_make_pool", lambda *_: None)
    monkeypatch.setattr(runtime, "_run_null_step", capture)
    with pytest.raises(MemoryPlanError, match=r"no room for 40 KV blocks and the graphs .* lower --gpu-memory-util"):
        runtime.allocate_kv(40, 16)


def test_kv_leaves_room_for_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (900 << 20, 1000 << 20))
    runtime = CudaRuntime("float32", use_graphs=False, device="cuda")
    assert runtime.free_bytes(1.0) == (900 - 256) << 20
    assert runtime.free_bytes(0.9) == pytest.approx((800 - 256) << 20, abs=1)
    assert runtime.free_bytes(0.2) == 0


def recorded(monkeypatch):
    """Makes launches do nothing but leave what decides how a kernel is compiled: types and constants."""
    launched = set()

    def get(kernel, _):
        def launch(*args, **constants):
            types = tuple(a.dtype for a in args if isinstance(a, torch.Tensor))
            launched.add((kernel.__name__, types, *constants.items()))

        return launch

    monkeypatch.setattr(type(sampling_kernels.publish), "__getitem__", get)
    return launched


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_start_up_compiles_every_kernel_that_serving_launches(device, monkeypatch, dtype):
    if device == "cuda":
        pytest.skip("launches are recorded under the interpreter")
    steps, program = Steps(), decoder_program()
    runtime = load(CudaRuntime(dtype, device=device), program, dtype=dtype, steps=steps)
    launched = recorded(monkeypatch)
    with torch.inference_mode():
        runtime._launch_null_steps()
    prepared = set(launched)
    launched.clear()
    one, start, words = np.array([7], np.int32), np.array([0, 1], np.int32), -(-program.vocab_size // 32)
    changes = [
        {},
        {"bias_start": start, "bias_ids": one, "bias_values": np.ones(1, np.float32)},
        {"seen_start": start, "seen_ids": one, "seen_counts": one},
        {"mask_of": np.zeros(1, np.int32), "masks": np.full((1, words), 5, np.uint32)},
    ]
    for change in changes:
        for temperature in (0.0, 1.0):
            for pieces in ([Piece(0, 0, 9)], [Piece(0, 9, 1)]):
                runtime.execute(steps.inputs(pieces, "last"))
                runtime.sample(sampling(1, temperature=np.full(1, temperature, np.float32), **change))
    names = {name for name, *_ in launched}
    assert {"adjust", "bias", "penalties", "chunk_argmax", "draw_wide", "_decode", "_prefill"} <= names
    assert launched <= prepared


def test_long_contexts_begin_first():
    staging = Staging(Staging.capacity(8, 8, 8, 1, 25), 1, torch.device("cpu"))
    inputs = Steps().inputs([Piece(0, 4, 1), Piece(1, 299, 1), Piece(2, 19, 1)], "last")
    shape = Shape(4, 4, is_decode=True)
    sampling = SamplingInputs.greedy(3)
    settings = Settings(sampling, 7)
    spans = send_padded(staging, inputs, sampling, settings, shape, tile_queries=4, null_slot=0)
    assert padded_views(staging, spans, shape, 4).attention.decode_rows.tolist() == [1, 2, 0, 3]
    mixed = Steps().inputs([Piece(0, 4, 1), Piece(3, 0, 5), Piece(1, 299, 1)], "last")
    step = send_step(staging, mixed, sampling, settings, tile_queries=4)
    assert step.attention.decode_rows.tolist() == [2, 0]


@pytest.mark.parametrize("use_graphs", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_the_report_says_whether_steps_are_captured(device, use_graphs):
    program = decoder_program()
    limits = {"max_num_tokens": 64, "max_num_logits": 4, "max_num_requests": 4}
    runtime = CudaRuntime("float32", use_graphs=use_graphs, device=device)
    description = runtime.load(program, RandomWeights(program), dtype="float32", **limits)
    assert ("no graphs" in description) != use_graphs


@pytest.mark.gpu
def test_graphs_give_what_eager_steps_give(device):
    plan = [[Piece(0, 0, 37), Piece(1, 0, 3), Piece(2, 0, 9)]]
    plan += [[Piece(0, 37 + n, 1), Piece(1, 3 + n, 1), Piece(2, 9 + n, 1)] for n in range(3)]
    with_graphs = compare(device, decoder_program(), plan, logits="last")
    assert with_graphs.num_replays == 3
    assert compare(device, decoder_program(), plan, logits="last", use_graphs=False).num_replays == 0


@pytest.mark.gpu
def test_graphs_of_mixed_steps_give_what_eager_steps_give(device):
    plan = [
        [Piece(0, 0, 37), Piece(1, 0, 3)],
        [Piece(0, 37, 1), Piece(1, 3, 20), Piece(2, 0, 9)],
        [Piece(0, 38, 1), Piece(1, 23, 1), Piece(2, 9, 30)],
    ]
    assert compare(device, decoder_program(), plan, logits="last").num_replays == 2
    assert compare(device, decoder_program(), plan, logits="last", use_graphs=False).num_replays == 0


def test_sizes_of_mixed_steps_are_few_and_all_known():
    sizes = {mixed_shape(n, 1, 2048, 16).num_tokens for n in range(1, 2048)}
    assert sorted(sizes) == mixed_sizes(2048)
    assert len(sizes) == 16


@pytest.mark.parametrize("rows", [4, 16])
def test_padding_of_a_mixed_step_changes_nothing(device, rows):
    steps, program = Steps(), decoder_program(**SMALL)
    plain, padded = (load(CudaRuntime("float32", device=device, use_graphs=False), program, steps=steps) for _ in "ab")
    first = steps.inputs([Piece(0, 0, 37), Piece(1, 0, 1), Piece(2, 0, 9)], "last")
    shape = mixed_shape(len(first.token_ids), 3, MAX_TOKENS, rows)
    assert shape == Shape(64, rows, is_decode=False)
    with torch.inference_mode():
        padded._launch(padded._send_padded(first, SamplingInputs.greedy(3), shape), GREEDY)
    padded._num_logits = 3
    np.testing.assert_allclose(padded.logits(), run(plain, first), atol=1e-5)
    then = steps.inputs([Piece(0, 37, 1), Piece(1, 1, 5), Piece(2, 9, 1)], "last")
    np.testing.assert_allclose(run(padded, then), run(plain, then), atol=1e-5)


def test_a_step_of_too_many_tiles_is_not_padded(device):
    steps = Steps(num_requests=40)
    runtime = load(CudaRuntime("float32", device=device, use_graphs=False), decoder_program(), steps=steps)
    inputs = steps.inputs([Piece(i, 0, 2) for i in range(40)], "last")
    assert runtime._send_padded(inputs, SamplingInputs.greedy(40), mixed_shape(80, 40, MAX_TOKENS, 64)) is None


def test_blocks_are_copied_in_all_layers(device):
    steps, program = Steps(), decoder_program(**SMALL)
    runtime = load(CudaRuntime("float32", device=device), program, steps=steps)
    run(runtime, steps.inputs([Piece(0, 0, 17)], "last"))
    first, last = int(steps.tables[0, 0]), int(steps.tables[3, 5])
    runtime.copy_blocks([(first, last)])
    inputs = steps.inputs([Piece(0, 17, 1)], "last")
    expected = run(runtime, inputs)
    inputs.block_tables[0, 0, 0] = last
    np.testing.assert_array_equal(run(runtime, inputs), expected)
