"""The switch of each fusion: what it joins runs apart, which is seen where it is launched, and logits stay."""

from collections import Counter

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from octavo.config import FUSIONS  # noqa: E402
from octavo.runtime.cuda import launches, operators  # noqa: E402
from octavo.runtime.cuda.kernels import linear, rope, rows  # noqa: E402
from tests.gpu.test_runtime import SHAPES, SMALL, compare  # noqa: E402
from tests.runtime.programs import Piece, attention_program, decoder_program  # noqa: E402

JOINED = {  # what is not launched any more
    "norm": "product with norm",
    "residual": "norm with sum",
    "activation": "product with activation",
    "rope": "write with rotation",
    "qkv": "product with heads",
    "attention": "attention with heads",
    "pdl": "early",
}
APART = {  # what is launched more often
    "norm": "norm",
    "residual": "sum",
    "activation": "activation",
    "rope": "rotation",
    "qkv": "write with rotation",
    "attention": "write with rotation",
    "pdl": "late",
}


@pytest.fixture
def launched(monkeypatch):
    """Counts what is launched, of what kind."""
    seen = Counter()

    def spy(owner, name, kinds_of):
        original = getattr(owner, name)

        def watched(*args, **kwargs):
            seen.update(kinds_of(args, kwargs))
            if "chained" in kwargs:
                seen["early" if kwargs["chained"] else "late"] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    def of_product(args, kwargs):
        fused = kwargs["fused"]
        activates = kwargs.get("activation", "none") != "none"
        return ["product with norm"] * (fused.norm_weight is not None) + ["product with activation"] * activates

    spy(linear, "few_rows", of_product)
    spy(rows, "norm", lambda args, kwargs: ["norm"] if args[2] is None else ["norm", "norm with sum"])
    spy(rows, "add", lambda args, kwargs: ["sum"])
    spy(rows, "epilogue", lambda args, kwargs: ["activation"])
    spy(rope, "rope_kv_write", lambda args, kwargs: ["write with rotation"] if args[5] else ["write"])
    spy(launches, "norm_and_rotate", lambda args, kwargs: ["rotation"])
    spy(operators, "decode_attention", lambda args, kwargs: ["attention with heads"] * bool(kwargs.get("turn")))
    kinds = {1: "product with activation", 64: "product with heads"}
    spy(operators.Product, "launch", lambda args, kwargs: [kinds[args[0]._kind]])
    monkeypatch.setattr(operators, "fills", lambda num_rows, num_out: num_rows > 20)
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSIONS)
def test_each_fusion_has_a_switch(device, launched, name):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("written for Hopper")
    program = decoder_program(hidden=64, heads=4, kv_heads=2, dim=64, inner=96)
    plan = [[Piece(0, 0, 150)], [Piece(0, 150, 1)], [Piece(0, 151, 1), Piece(1, 0, 2)]]
    compare(device, program, plan, dtype="bfloat16")
    together = Counter(launched)
    launched.clear()
    compare(device, program, plan, dtype="bfloat16", fusions=set(FUSIONS) - {name})
    assert together[JOINED[name]] > 0 == launched[JOINED[name]]
    assert launched[APART[name]] > together[APART[name]]


def test_with_all_of_them_off_nothing_is_joined(device, launched):
    program = decoder_program(**SMALL)
    compare(device, program, [[Piece(0, 0, 3)], [Piece(0, 3, 1)]], fusions=())
    assert not any(launched[kind] for kind in JOINED.values())
    assert all(launched[APART[name]] for name in ("norm", "residual", "activation", "rope"))


def test_heads_are_normed_and_partly_rotated_apart(device, launched):
    program = attention_program(**SHAPES["grouped, qk-norm, partial rope"])
    compare(device, program, [[Piece(0, 0, 3)], [Piece(0, 3, 1)]], fusions=set(FUSIONS) - {"rope"})
    assert launched["rotation"] == launched["write"] > 0 == launched["write with rotation"]
