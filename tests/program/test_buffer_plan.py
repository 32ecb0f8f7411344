"""The buffer plan: two buffers that live at once never share memory, whatever the program."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.models.decoder import record
from octavo.models.reader import read_spec
from octavo.program.ops import Add, Buffer, Embedding, GatherRows, Linear, Norm, Rows, Weight
from octavo.program.program import Program, ProgramBuilder
from tests.model.tiny import ARCHITECTURES, make_tiny


def assert_plan_is_safe(program: Program) -> None:
    """Replays the nodes: a slot must still hold the buffer that a node reads, and fit what is written."""
    plan = program.plan_buffers()
    slot_of = dict(zip(program.buffers, plan.slot_of, strict=True))
    holder: dict[int, Buffer] = {}
    for node in program.nodes:
        for buffer in node.inputs:
            assert holder[slot_of[buffer]] is buffer, f"{node.label} reads {buffer.name}, which was overwritten"
        allowed = {(slot_of[out], slot_of[source]) for out, source in node.inplace()}
        for out in node.outputs:
            for source in node.inputs:
                assert slot_of[out] != slot_of[source] or (slot_of[out], slot_of[source]) in allowed
            holder[slot_of[out]] = out
            assert plan.slot_rows[slot_of[out]] is out.rows
            assert plan.slot_width[slot_of[out]] >= out.width
        slots = [slot_of[out] for out in node.outputs]
        assert len(set(slots)) == len(slots)
    assert holder[slot_of[program.hidden]] is program.hidden
    assert holder[slot_of[program.logits]] is program.logits


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random chains of sums, norms with residuals and products over random earlier buffers."""
    build = ProgramBuilder()
    source = build.tokens("source", 8)
    build.add(Embedding("embed", _matrix("embed", 11, 8), source))
    live = [source]
    for index in range(draw(st.integers(1, 25))):
        x, y = (live[draw(st.integers(0, len(live) - 1))] for _ in range(2))
        width = draw(st.sampled_from((8, 8, 16)))
        out, kept = build.tokens(f"out{index}", width), build.tokens(f"kept{index}", x.width)
        kind = draw(st.sampled_from(("linear", "add", "norm")))
        if kind == "linear" or x.width != y.width or x.width != width or x is y:
            build.add(Linear(f"{index}", x, _matrix(f"w{index}", width, x.width), out))
        elif kind == "add":
            build.add(Add(f"{index}", x, y, out))
        else:
            build.add(Norm(f"{index}", x, _matrix(f"n{index}", width), out, 1e-6, residual=y, residual_out=kept))
            live.append(kept)
        live.append(out)
    last = live[-1]
    hidden, logits = build.logit_rows("hidden", last.width), build.logit_rows("logits", 11)
    build.add(GatherRows("gather", last, hidden))
    build.add(Linear("head", hidden, _matrix("head", 11, last.width), logits))
    return build.finish(hidden=hidden, logits=logits, vocab_size=11, max_len=8)


def _matrix(name: str, *shape: int) -> Weight:
    return Weight(name, (name,), (shape[0],), shape, "linear")


@settings(max_examples=150, deadline=None)
@given(programs())
def test_random_programs(program: Program) -> None:
    assert_plan_is_safe(program)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "opt-350m"])
def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    overrides = {"do_layer_norm_before": False, "word_embed_proj_dim": 32} if architecture == "opt-350m" else {}
    files = make_tiny(architecture.removesuffix("-350m"), tmp_path, **overrides)
    program = record(read_spec(files))
    assert_plan_is_safe(program)
    plan = program.plan_buffers()
    assert len(plan.slot_width) <= 10, "a decoder needs a handful of slots, however many layers it has"
    assert plan.elements(10, 2) == sum(
        (10 if rows is Rows.TOKENS else 2) * width for rows, width in zip(plan.slot_rows, plan.slot_width, strict=True)
    )
