"""Grammars, allowed tokens and bad words bound what a Request samples, and touch no other."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
from test_core import make_core

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.frontend import _error
from octavo.engine.grammar import to_grammar
from octavo.engine.rules import RuleBook, Rules, Thinking
from octavo.errors import InvalidValueError, StepError
from octavo.executor.local import LocalExecutor
from octavo.messages import AbortRequests, AddRequest
from octavo.models.spec import ModelFiles
from octavo.sampling_params import SamplingParams
from octavo.step import ScheduledRow, SchedulerOutput
from tests.tiny_llama import TINY, VOCAB

pytest.importorskip("llguidance")
EOS = 2


class Ascii:
    """Token i is the character i + 29, from 3 (a blank) on."""

    vocab_size = VOCAB
    special_ids = frozenset((0, 1, EOS))

    def token_bytes(self, token: int) -> bytes:
        return b"<%d>" % token if token in self.special_ids else bytes([token + 29])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) - 29 for c in text]


def text(tokens: list[int]) -> str:
    return "".join(chr(t + 29) for t in tokens if t > EOS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return ModelFiles("tiny", "hf", folder)


def ruled(files, **settings) -> EngineCore:
    config = EngineConfig(
        model="tiny", load_format="dummy", **{"runtime": "reference", "num_gpu_blocks_override": 64, **settings}
    )
    executor = LocalExecutor(config, files)
    return EngineCore(config, executor, executor.start(), tokenizer=Ascii)


def ask(core, number, *, kind=None, spec=None, bad=(), prompt=None, output=(), max_tokens=60, **params):
    options = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **params})
    message = AddRequest(str(number), prompt or [5 + number, 6], options, max_tokens, seed=number)
    message.grammar = to_grammar(kind, spec) if kind else None
    message.bad_ids = [Ascii().encode(word) for word in bad]
    message.output_token_ids = list(output)
    core.handle(message)


def finish(core):
    """Tokens, reasons and errors by request."""
    tokens, reasons, errors = {}, {}, {}
    while core.has_work:
        for delta in core.step().deltas:
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason:
                reasons[delta.request_id], errors[delta.request_id] = str(delta.finish_reason), delta.error
    return tokens, reasons, errors


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("runtime", ["reference", "native"])
def test_grammars_bound_greedy_and_sampled_answers(files, runtime) -> None:
    core = ruled(files, runtime=runtime)
    for number, options in enumerate([{}, {"temperature": 1.5}, {"temperature": 3.0, "repetition_penalty": 1.5}]):
        ask(core, number, kind="regex", spec="[a-f]{3,9}[0-9]", **options)
        ask(core, 10 + number, kind="choice", spec=["red", "green", 'q"uote'], **options)
        ask(
            core,
            20 + number,
            kind="json",
            spec=SCHEMA,
            logit_bias={ord("0") - 29 + d: -9.0 for d in range(10)},
            **options,
        )
        ask(core, 30 + number, kind="grammar", spec='root ::= "(" root ")" | "x"', **options)
    tokens, reasons, errors = finish(core)
    assert set(errors.values()) == {None}
    for number in range(3):
        assert re.fullmatch("[a-f]{3,9}[0-9]", text(tokens[str(number)]))
        assert text(tokens[str(10 + number)]) in ("red", "green", 'q"uote')
        if reasons[str(20 + number)] == "stop":
            assert json.loads(text(tokens[str(20 + number)]))["b"] in ("x", "yy")
        if reasons[str(30 + number)] == "stop":
            assert re.fullmatch(r"\(*x\)*", text(tokens[str(30 + number)]))
    ended = [reasons[str(n)] for n in (0, 1, 2, 10, 11, 12)]
    assert ended == ["stop"] * 6
    assert any(reasons[str(n)] == "stop" for n in (20, 21, 22))


def test_others_are_not_touched(files) -> None:
    def run(with_rules: bool) -> list[int]:
        core = ruled(files)
        ask(core, 1, max_tokens=40, ignore_eos=True)
        if with_rules:
            ask(core, 2, kind="regex", spec="[ab]{20}")
            ask(core, 3, allowed_token_ids=[40, 41], max_tokens=30)
        return finish(core)[0]["1"]

    assert run(True) == run(False)


def test_allowed_tokens(files) -> None:
    core = ruled(files)
    ask(core, 1, allowed_token_ids=[40, 96, 5], temperature=2.0, max_tokens=50)
    ask(core, 2, kind="regex", spec="[a-z]+", allowed_token_ids=[Ascii().encode("q")[0], EOS], max_tokens=20)
    tokens, _, _ = finish(core)
    assert set(tokens["1"]) == {40, 96, 5}
    assert set(text(tokens["2"])) <= {"q"}


def test_bad_words_are_never_completed(files) -> None:
    core = ruled(files)
    ask(core, 1, ignore_eos=True, max_tokens=30)
    free = text(finish(core)[0]["1"])
    words = [free[0], free[3:6]]
    core = ruled(files)
    ask(core, 1, bad=words, bad_words=words, ignore_eos=True, max_tokens=60)
    bounded = text(finish(core)[0]["1"])
    assert bounded != free
    assert not any(word in bounded for word in words)


def test_preemption_and_a_new_engine_go_on_in_the_middle_of_a_grammar(files) -> None:
    """Twelve grammars in a pool for about four; then one answer is continued by an engine that never saw its start."""
    spec = "([a-c][d-f]){30}"

    def run(**settings):
        core = ruled(files, **settings)
        for number in range(12):
            ask(core, number, kind="regex", spec=spec, temperature=1.0, max_tokens=70)
        return finish(core), core

    (whole, reasons, _), _ = run()
    (small, _, _), core = run(num_gpu_blocks_override=17)
    assert core.log.total("num_preempted") > 0
    assert small == whole
    assert set(reasons.values()) == {"stop"}
    core = ruled(files)
    ask(core, 3, kind="regex", spec=spec, temperature=1.0, max_tokens=70, output=whole["3"][:25])
    assert finish(core)[0]["3"] == whole["3"][25:]


def test_a_grammar_that_cannot_be_built_ends_its_request_alone(files) -> None:
    core = make_core(files)  # without a tokenizer
    ask(core, 1, max_tokens=5, ignore_eos=True)
    ask(core, 2, kind="regex", spec="a+")
    tokens, reasons, errors = finish(core)
    assert (reasons["1"], len(tokens["1"])) == ("length", 5)
    assert reasons["2"] == "error"
    assert "needs a tokenizer" in errors["2"]


def test_rules_that_leave_nothing_end_their_request_by_its_own_fault(files) -> None:
    """A grammar that is complete allows nothing but the end, which the list leaves out; a list of one banned word."""
    core = ruled(files)
    a, b = ord("a") - 29, ord("b") - 29
    ask(core, 1, kind="regex", spec="[ab]{2}", allowed_token_ids=[a, b])
    ask(core, 2, bad=["a"], allowed_token_ids=[a])
    ask(core, 3, max_tokens=5, ignore_eos=True)
    ends = {}
    while core.has_work:
        ends |= {delta.request_id: delta for delta in core.step().deltas if delta.finish_reason}
    assert ends["3"].finish_reason == "length"
    for number in "12":
        error = _error(ends[number])
        assert (type(error), "leave no token" in str(error)) == (InvalidValueError, True)


@pytest.mark.parametrize("where", ["_matcher", "mask", "take"])
def test_a_bug_of_ours_is_logged_and_is_no_fault_of_the_client(files, monkeypatch, caplog, where) -> None:
    core = ruled(files)

    def broken(*_: object) -> None:
        raise KeyError("our bug")

    monkeypatch.setattr(RuleBook if where == "_matcher" else Rules, where, broken)
    ask(core, 1, kind="regex", spec="a+")
    [delta] = [delta for _ in range(1000) for delta in core.step().deltas if delta.finish_reason]
    assert delta.finish_reason == "error"
    assert (type(_error(delta)), _error(delta).status) == (StepError, 500)
    assert "Traceback" in caplog.text
    assert "KeyError: 'our bug'" in caplog.text


def test_a_request_that_cannot_be_added_for_a_bug_of_ours_is_logged(files, monkeypatch, caplog) -> None:
    core = ruled(files)
    monkeypatch.setattr("octavo.scheduler.scheduler.refuse_impossible", lambda *_: {}["our bug"])
    ask(core, 1)
    [delta] = core.step().deltas
    assert (type(_error(delta)), "KeyError: 'our bug'" in caplog.text) == (StepError, True)
    ask(core, 1)
    caplog.clear()
    monkeypatch.undo()
    ask(core, 2, prompt=[5] * 4000)
    assert "ContextLengthError" in {delta.error_kind for delta in core.step().deltas}
    assert not caplog.text


def test_a_request_may_be_aborted_while_its_grammar_is_built(files) -> None:
    core = ruled(files)
    ask(core, 1, kind="regex", spec="[a-z]+")
    core.handle(AbortRequests(["1"]))
    assert finish(core)[1] == {"1": "abort"}
    ask(core, 1, kind="choice", spec=["yes"])
    assert text(finish(core)[0]["1"]) == "yes"


@pytest.mark.parametrize("vocab_size", [96, 97, 128])
def test_a_mask_is_as_wide_as_the_vocabulary(vocab_size: int) -> None:
    book = RuleBook(vocab_size, [EOS], Ascii)
    message = AddRequest("1", [5], SamplingParams(allowed_token_ids=[5, 70, 71]), 5, seed=0)
    message.grammar = to_grammar("regex", "[a-z]+")
    book.open(message)
    while book.opening:
        assert [error for _, error in book.opened()] in ([], [None])
    step = SchedulerOutput(0, scheduled=[ScheduledRow(3, "1", 0, 0, 1, True)])
    mask = book.masks(step)[3]
    assert mask.shape == (-(-vocab_size // 32),)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [70, 71]
    assert book.take([]) == []
    book.close()


def test_a_mask_is_cheap(files) -> None:
    """A thousand masks of a vocabulary of 97 in well under a second of CPU."""
    core = ruled(files)
    ask(core, 1, kind="regex", spec="[a-z]+", allowed_token_ids=[70, 71])
    while not core._rules.live:
        core.step()
    rules = core._rules.live["1"]
    began = time.process_time()
    for _ in range(1000):
        rules.mask()
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("begin", "tokens", "forced"),
    [
        ([], [5, 5, 5], [7, 8]),  # from the start
        ([3], [3, 5, 5, 5], [7, 8]),  # from the mark on
        ([3], [5, 5, 5, 5], []),  # no thoughts
        ([], [5, 7, 8], []),  # they ended in time
        ([], [5, 5, 7], [8]),  # the end has begun
        ([], [5, 7, 7], [8]),
    ],
)
def test_thoughts_are_ended(begin, tokens, forced):
    thinking = Thinking(3, begin, [7, 8])
    for token in tokens[:-1]:
        thinking.take([token])
        assert thinking.forced() is None
    thinking.take(tokens[-1:])
    for token in forced:
        assert thinking.forced() == token
        thinking.take([token])
    assert thinking.forced() is None
    thinking.take([5] * 9)
    assert thinking.forced() is None, "once is enough"


def test_an_engine_ends_thoughts(files):
    core = ruled(files)
    end = [40, 41, 42]
    params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=12, max_thinking_tokens=4)
    core.handle(AddRequest("thinks", [5, 6, 7], params, 12, seed=1, think_ids=([], end)))
    plain = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=12)
    core.handle(AddRequest("plain", [5, 6, 7], plain, 12, seed=1))
    tokens = {"thinks": [], "plain": []}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None
            tokens[delta.request_id] += delta.token_ids
    assert tokens["thinks"][:4] == tokens["plain"][:4]
    assert tokens["thinks"][4:7] == end
    assert len(tokens["thinks"]) == len(tokens["plain"]) == 12
    assert tokens["plain"][4:7] != end
