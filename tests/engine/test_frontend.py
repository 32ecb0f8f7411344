"""The front half: groups, stop strings, logprobs, kinds of output; engine deltas are played by hand."""

import pytest
import tokenizers
from tokenizers import decoders, models

from octavo.config import EngineConfig
from octavo.engine.frontend import Frontend
from octavo.errors import ContextLengthError, InvalidValueError, QueueFullError, StepError, TimeLimitError
from octavo.messages import FinishRequest, RequestDelta
from octavo.sampling_params import RequestOutputKind, SamplingParams
from octavo.step import TokenLogprobs
from octavo.text.tokenizer import Tokenizer

LETTERS = [chr(c) for c in range(0x21, 0x7F)]


def ids(text):
    return [LETTERS.index(c) for c in text]


@pytest.fixture
def front():
    core = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(LETTERS)}, []))
    core.decoder = decoders.ByteLevel()
    return Frontend(Tokenizer(core), len(LETTERS), EngineConfig(max_logprobs=5), max_model_len=32)


def add(front, prompt="ab", **params):
    text, tokens = front.tokenize(prompt)
    return front.add("r", text, tokens, SamplingParams(**params))


def outputs(front, *deltas):
    updates, finishes, _ = front.process(list(deltas))
    return [u.output for u in updates if u.output is not None], finishes


def test_n_makes_children_with_their_own_seeds_and_one_output(front):
    _, requests = add(front, n=3, seed=10)
    assert [r.request_id for r in requests] == ["r#0", "r#1", "r#2"]
    assert [r.seed for r in requests] == [10, 11, 12]
    out, _ = outputs(front, RequestDelta("r#1", ids("x"), finish_reason="length"))
    assert [o.text for o in out[0].outputs] == ["", "x", ""]
    assert not out[0].finished
    out, _ = outputs(
        front,
        RequestDelta("r#0", ids("y"), finish_reason="length"),
        RequestDelta("r#2", ids("z"), finish_reason="stop"),
    )
    assert len(out) == 1
    assert out[0].finished
    assert [o.finish_reason for o in out[0].outputs] == ["length", "length", "stop"]
    assert front.num_unfinished == 0


def test_seeds_drawn_by_the_front_repeat_with_its_own_seed(front):
    other = Frontend(front.tokenizer, len(LETTERS), EngineConfig(max_logprobs=5), max_model_len=32)
    assert add(front)[1][0].seed == add(other)[1][0].seed


def test_delta_kind_carries_only_what_is_new(front):
    add(front, output_kind=RequestOutputKind.DELTA, max_tokens=8)
    first, _ = outputs(front, RequestDelta("r", ids("he")))
    second, _ = outputs(front, RequestDelta("r", ids("y"), finish_reason="length"))
    assert [(o[0].outputs[0].text, o[0].outputs[0].token_ids) for o in (first, second)] == [
        ("he", ids("he")),
        ("y", ids("y")),
    ]
    assert second[0].finished


def test_final_only_kind_says_nothing_before_the_end(front):
    add(front, output_kind=RequestOutputKind.FINAL_ONLY)
    assert outputs(front, RequestDelta("r", ids("he")))[0] == []
    assert outputs(front, RequestDelta("r", ids("y"), finish_reason="length"))[0][0].outputs[0].text == "hey"


def test_a_stop_string_ends_the_request_and_tells_the_engine(front):
    add(front, stop="lo", logprobs=0)
    entry = TokenLogprobs(-1.0, 1, [], [])
    outputs(front, RequestDelta("r", ids("hel"), [entry] * 3))
    out, finishes = outputs(front, RequestDelta("r", ids("o!!"), [entry] * 3))
    answer = out[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("hel"[:2], "stop", "lo")
    assert answer.token_ids == ids("helo")
    assert len(answer.logprobs) == 4
    assert answer.cumulative_logprob == -4.0
    assert finishes == [FinishRequest("r", 4)]
    assert outputs(front, RequestDelta("r", ids("late")))[0] == [], "what was in flight is dropped"


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_whoever_pays_hears_of_each_token_of_each_answer(front, kind):
    group, _ = add(front, n=2, stop="lo", output_kind=kind)
    heard = []
    group.on_tokens = heard.append
    outputs(front, RequestDelta("r#0", ids("hel")), RequestDelta("r#1", ids("x")))
    outputs(front, RequestDelta("r#0", ids("o!!")), RequestDelta("r#1", [], finish_reason="abort"))
    assert heard == [3, 1, 1], "what comes behind a stop string is not paid"


def test_a_stop_token_counts_but_has_no_text(front):
    add(front, stop_token_ids=ids("!"))
    out, _ = outputs(front, RequestDelta("r", ids("hi!"), finish_reason="stop", stop_reason=ids("!")[0]))
    answer = out[0].outputs[0]
    assert (answer.text, answer.token_ids, answer.stop_reason) == ("hi", ids("hi!"), ids("!")[0])


def test_answers_that_share_no_prefill_all_tell_of_the_prompt(front):
    """Whichever comes first: a stream that echoes the prompt begins with it."""
    alone = EngineConfig(max_logprobs=5, enable_copy_on_write=False)
    other = Frontend(front.tokenizer, len(LETTERS), alone, max_model_len=32)
    for this, expected in ((front, [1, None]), (other, [1, 1])):
        assert [request.params.prompt_logprobs for request in add(this, n=2, prompt_logprobs=1)[1]] == expected


def told(*logprobs):
    return [TokenLogprobs(logprob, 1, [], []) for logprob in logprobs]


def test_a_stream_keeps_no_logprobs_and_cuts_those_behind_a_stop_string(front):
    group, _ = add(front, stop="lo", logprobs=0, output_kind=RequestOutputKind.DELTA)
    first, _ = outputs(front, RequestDelta("r", ids("he"), told(-1, -2)))
    second, finishes = outputs(front, RequestDelta("r", ids("lox"), told(-4, -8, -16)))
    assert finishes == [FinishRequest("r", 4)]
    assert [[e[t].logprob for t, e in zip(o[0].outputs[0].token_ids, o[0].outputs[0].logprobs, strict=True)]
            for o in (first, second)] == [[-1, -2], [-4, -8]]  # fmt: skip
    assert second[0].outputs[0].cumulative_logprob == -15
    assert group.children[0].output.logprobs == []


def test_logprobs_put_the_sampled_token_first(front):
    add(front, logprobs=2)
    out, _ = outputs(front, RequestDelta("r", [7], [TokenLogprobs(-3.0, 5, [1, 2], [-0.1, -0.2])]))
    answer = out[0].outputs[0]
    assert list(answer.logprobs[0]) == [7, 1, 2]
    assert answer.logprobs[0][7].rank == 5
    assert answer.logprobs[0][1].decoded_token == LETTERS[1]
    assert answer.cumulative_logprob == -3.0


def test_cumulative_outputs_are_snapshots(front):
    add(front)
    first, _ = outputs(front, RequestDelta("r", ids("a")))
    outputs(front, RequestDelta("r", ids("b")))
    assert first[0].outputs[0].token_ids == ids("a")


def test_abort_forgets_and_names_what_runs(front):
    group, _ = add(front, n=2)
    outputs(front, RequestDelta("r#0", ids("x"), finish_reason="stop"))
    assert front.running("r") == ["r#1"]
    assert front.abort(group) == ["r#1"]
    assert front.num_unfinished == 0


def test_wrong_prompts_are_refused(front):
    with pytest.raises(InvalidValueError, match="empty"):
        front.tokenize("")
    with pytest.raises(InvalidValueError, match="from 0 to 93"):
        front.tokenize([1, 94])
    with pytest.raises(InvalidValueError, match="from 0 to 93"):
        front.tokenize({"prompt_token_ids": [True]})
    with pytest.raises(InvalidValueError, match="'nonsense'"):
        front.tokenize({"nonsense": 1})
    with pytest.raises(InvalidValueError, match="not int"):
        front.tokenize(3)
    with pytest.raises(InvalidValueError, match="not NoneType"):
        front.tokenize({"prompt_token_ids": None})
    with pytest.raises(ContextLengthError, match="33 characters, so 33 tokens or more; the context is 32"):
        front.tokenize("a" * 33)
    with pytest.raises(ContextLengthError, match="32 tokens; the context is 32"):
        front.add("r", None, [1] * 32, SamplingParams())
    add(front)
    with pytest.raises(InvalidValueError, match="already running"):
        add(front)


def test_parameters_are_held_against_the_model_and_the_engine(front):
    for wrong in ({"stop_token_ids": [94], "min_tokens": 2}, {"logit_bias": {94: 1.0}}):
        with pytest.raises(InvalidValueError, match="token id 94 is outside the vocabulary of 94"):
            add(front, **wrong)
    with pytest.raises(InvalidValueError, match="at most 5"):
        add(front, logprobs=6)
    assert front.num_unfinished == 0


def test_max_tokens_is_cut_to_the_context(front):
    assert add(front, max_tokens=None)[1][0].max_tokens == 30
    assert front.add("s", None, [1] * 30, SamplingParams(max_tokens=16))[1][0].max_tokens == 2


def test_a_refusal_and_a_timeout_are_errors_of_their_own(front):
    group, [request] = front.add("a", None, [5, 6], SamplingParams(max_tokens=4), tenant="t", timeout=1.5)
    assert (request.tenant, request.timeout) == ("t", 1.5)
    full = RequestDelta("a", finish_reason="error", error="full", error_kind="QueueFullError", retry_after=7.0)
    front.process([full])
    assert isinstance(group.error, QueueFullError)
    assert group.error.retry_after == 7.0
    for kind, expected in (("TimeLimitError", TimeLimitError), (None, StepError)):
        group, _ = front.add("b", None, [5, 6], SamplingParams(max_tokens=4))
        front.process([RequestDelta("b", finish_reason="error", error="why", error_kind=kind)])
        assert type(group.error) is expected
        assert str(group.error) == "why"


def test_what_is_relayed_is_not_handed_out_but_the_end_is(front):
    group, _ = add(front, n=2, output_kind=RequestOutputKind.DELTA)
    taken = []

    def relay(new):
        taken.append((new.index, new.text, new.token_ids))
        return new.text != "no"

    group.relay = relay
    assert outputs(front, RequestDelta("r#0", ids("a")), RequestDelta("r#1", ids("b")))[0] == []
    out, _ = outputs(
        front, RequestDelta("r#0", ids("no")), RequestDelta("r#1", ids("c")), RequestDelta("r#0", ids("d"))
    )
    assert [(o.index, o.text) for o in out[0].outputs] == [(0, "no"), (1, "c"), (0, "d")], "none passes a refused one"
    out, _ = outputs(front, RequestDelta("r#0", ids("e"), finish_reason="length"))
    assert [(o.text, o.token_ids, o.finish_reason) for o in out[0].outputs] == [("e", ids("e"), "length")]
    assert taken == [(0, "a", ids("a")), (1, "b", ids("b")), (0, "no", ids("no"))]
    assert len(group.children[0].output.token_ids) == 5
