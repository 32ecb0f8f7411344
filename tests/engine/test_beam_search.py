"""Beam search against transformers' generate, token for token: lengths, penalties, stops, pools that are too small."""

import random

import pytest

from octavo import LLM, BeamSearchParams, SamplingParams
from octavo.errors import InvalidValueError
from octavo.simulate.replay import Replay
from tests.model.tiny import load_oracle, make_tiny, torch

PROMPTS = [
    [random.Random(seed).randrange(3, 101) for _ in range(length)] for seed, length in enumerate((5, 16, 33, 48))
]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny("llama", folder)


@pytest.fixture(scope="module")
def oracle(files):
    model = load_oracle(files)

    def generate(prompt, width, n, stop, **options):
        if width == 1:  # which transformers calls greedy, and knows no options for
            options = {}
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([prompt]), num_beams=width, num_return_sequences=n, max_new_tokens=NUM_TOKENS,
                do_sample=False, pad_token_id=0, eos_token_id=stop or None, return_dict_in_generate=True,
                output_scores=True, **options,
            )  # fmt: skip
        answers = []
        for ids in out.sequences[:, len(prompt) :].tolist():
            end = next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))
            answers.append(ids[:end])
        if width > 1:
            return answers, out.sequences_scores.tolist()
        told = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        return answers, [told[0, : len(answers[0])].mean().item()]

    return generate


def make_llm(files, **settings):
    kwargs = {"num_gpu_blocks_override": 96, "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 96}
    return LLM(str(files.path), **{**kwargs, **settings})


def ask(llm, params):
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    return llm.generate(prompts, params, use_tqdm=False)


STOPS = [2, 7, 11, 40, 55, 71, 83, 98]  # enough of them that random models meet one


@pytest.mark.parametrize(
    ("width", "n", "options"),
    [
        (4, 4, {}),
        (5, 2, {"length_penalty": 0.0}),
        (3, 3, {"length_penalty": 2.0, "early_stopping": True}),
        (4, 2, {"length_penalty": -1.0}),
        (4, 4, {"length_penalty": 1.5, "early_stopping": "never"}),
        (1, 1, {"early_stopping": True}),
    ],
)
def test_answers_equal_transformers(files, oracle, width, n, options):
    with make_llm(files, runtime="native") as llm:
        params = SamplingParams(
            use_beam_search=True, n=n, best_of=width, max_tokens=NUM_TOKENS, stop_token_ids=STOPS, ignore_eos=True,
            **options,
        )  # fmt: skip
        outputs = ask(llm, params)
        log = llm.core.log
        assert llm.core.scheduler.kv.pool.num_used == 0
        if width > 1:
            assert log.total("num_forked") > 0
            assert log.total("num_copied_blocks") > 0
    stopped = 0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected, scores = oracle(prompt, width, n, STOPS, **options)
        assert [a.token_ids for a in output.outputs] == expected
        penalty = options.get("length_penalty", 1.0)
        ours = [a.cumulative_logprob / len(a.token_ids) ** penalty for a in output.outputs]
        assert ours == pytest.approx(scores, rel=1e-5)
        stopped += sum(a.finish_reason == "stop" for a in output.outputs)
    assert stopped > 0, "no answer ended with a stop token"


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": False},
        {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 16, "max_num_seqs": 16, "admission_headroom": 0.0},
        {"num_gpu_blocks_override": 24, "enable_prefix_caching": False, "max_num_seqs": 16},
        {"runtime": "reference", "block_size": 4, "num_gpu_blocks_override": 400},
    ],
    ids=["no cache", "small pool, chunks", "small pool, no cache", "reference"],
)
def test_sharing_chunks_and_preemption_change_nothing(files, settings):
    params = SamplingParams(use_beam_search=True, n=4, max_tokens=NUM_TOKENS, stop_token_ids=STOPS, logprobs=2)
    answers = []
    for given in ({}, settings):
        with make_llm(files, **{"runtime": "native", **given}) as llm:
            answers.append([[(a.token_ids, a.finish_reason) for a in o.outputs] for o in ask(llm, params)])
            preempted = llm.core.log.total("num_preempted")
            assert (preempted > 0) == (given.get("num_gpu_blocks_override") == 24)
    assert answers[0] == answers[1]


def test_a_recorded_engine_with_beams_replays_to_the_same_decisions(files, tmp_path):
    settings = {"num_gpu_blocks_override": 24, "max_num_seqs": 16, "admission_headroom": 0.0, "record": str(tmp_path)}
    with make_llm(files, runtime="native", **settings) as llm:
        ask(llm, SamplingParams(use_beam_search=True, n=4, max_tokens=NUM_TOKENS, stop_token_ids=STOPS))
        log = llm.core.log
        assert min(log.total("num_preempted"), log.total("num_forked"), log.total("num_copied_blocks")) > 0
        num_steps = log.num_steps
    replay = Replay(next(tmp_path.iterdir()))
    assert replay.run() is None
    assert len(replay.steps) == num_steps


def test_the_offline_call_has_vllms_shape(files, oracle):
    with make_llm(files, runtime="native") as llm:
        params = BeamSearchParams(beam_width=3, max_tokens=NUM_TOKENS, ignore_eos=True, length_penalty=0.5)
        outputs = llm.beam_search([{"prompt_token_ids": p} for p in PROMPTS], params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected, _ = oracle(prompt, 3, 3, [], length_penalty=0.5)
        assert [s.tokens for s in output.sequences] == [prompt + e for e in expected]
        for sequence in output.sequences:
            answer = zip(sequence.tokens[len(prompt) :], sequence.logprobs, strict=True)
            told = [entry[token].logprob for token, entry in answer]
            assert sum(told) == pytest.approx(sequence.cum_logprob, abs=1e-4)
            assert sequence.finish_reason == "length"


def test_best_of_returns_the_likeliest_samples(files):
    with make_llm(files, runtime="native") as llm:
        common = {"temperature": 1.0, "seed": 3, "max_tokens": 8, "ignore_eos": True}
        [all_of] = llm.generate(
            [{"prompt_token_ids": PROMPTS[0]}], SamplingParams(n=6, logprobs=0, **common), use_tqdm=False
        )
        [best] = llm.generate(
            [{"prompt_token_ids": PROMPTS[0]}], SamplingParams(n=2, best_of=6, **common), use_tqdm=False
        )
    ranked = sorted(all_of.outputs, key=lambda o: -o.cumulative_logprob)
    assert [o.token_ids for o in best.outputs] == [o.token_ids for o in ranked[:2]]
    assert [o.index for o in best.outputs] == [0, 1]
    assert best.outputs[0].logprobs is None


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        ({"n": 9}, {"max_num_seqs": 8}, "9 beams"),
        ({"n": 8, "max_tokens": 80}, {"num_gpu_blocks_override": 12}, "in 8 beams, need"),
    ],
)
def test_beams_that_cannot_fit_are_refused(files, params, settings, message):
    with make_llm(files, **settings) as llm, pytest.raises(Exception, match=message):
        ask(llm, SamplingParams(use_beam_search=True, **params))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.7),
        ("top_k", 5),
        ("stop", "x"),
        ("logit_bias", {1: 1.0}),
        ("best_of", 65),
        ("early_stopping", 1),
        ("length_penalty", 11.0),
    ],
)
def test_what_beam_search_does_not_take_is_refused_by_name(name, value):
    with pytest.raises(InvalidValueError) as caught:
        SamplingParams(use_beam_search=True, n=2, **{name: value})
    assert caught.value.param == name
