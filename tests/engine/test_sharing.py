"""n answers on a real runtime: forked or not, cached or not, the same tokens."""

import json

import pytest

from octavo import LLM, SamplingParams
from octavo.runtime.reference import ReferenceRuntime
from tests.engine.naive import NaiveLoop
from tests.engine.test_core import ModelFiles, prompts_with_shared_prefixes
from tests.tiny_llama import TINY, VOCAB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def make_llm(folder, **settings):
    kwargs = {"load_format": "dummy", "num_gpu_blocks_override": 64, "skip_tokenizer_init": True, "dtype": "float32"}
    return LLM(str(folder), **{**kwargs, **settings})


@pytest.mark.parametrize("runtime", ["reference", "native"])
def test_forked_answers_are_those_of_separate_requests(folder, runtime):
    prompt = prompts_with_shared_prefixes()[0]
    params = SamplingParams(n=5, temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)
    answers = {}
    for sharing in (True, False):
        for caching in (True, False):
            settings = {"enable_copy_on_write": sharing, "enable_prefix_caching": caching, "runtime": runtime}
            with make_llm(folder, **settings) as llm:
                [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
                log = llm.core.log
                assert log.total("num_forked") == (4 if sharing else 0)
                assert log.total("num_copied_blocks") == (4 if sharing and len(prompt) % 16 else 0)
                if sharing:
                    assert log.total("num_prefill_tokens") == len(prompt) - 1, "the prompt was computed once"
                answers[sharing, caching] = [o.token_ids for o in output.outputs]
    assert len({tuple(a) for a in answers[True, True]}) == 5, "seeds differ"
    assert all(a == answers[True, True] for a in answers.values())
    if runtime == "reference":
        loop = NaiveLoop(ReferenceRuntime(), ModelFiles("tiny", "hf", folder), load_format="dummy")
        assert answers[True, True] == [loop.generate(prompt, 24, temperature=1.0, seed=7 + i) for i in range(5)]
    assert max(map(max, answers[True, True])) < VOCAB


def test_forks_in_a_crowd_with_penalties_chunks_and_a_small_pool(folder):
    prompts = [{"prompt_token_ids": p} for p in prompts_with_shared_prefixes()]
    params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=20, ignore_eos=True, presence_penalty=0.5)
    tight = {"num_gpu_blocks_override": 16, "max_model_len": 160, "max_num_batched_tokens": 24, "max_num_seqs": 12}
    answers = []
    for settings in (tight, {"enable_copy_on_write": False, "enable_prefix_caching": False}):
        with make_llm(folder, runtime="native", **settings) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answers.append([[o.token_ids for o in output.outputs] for output in outputs])
            if settings is tight:
                for event in ("num_forked", "num_copied_blocks", "num_preempted", "num_chunked"):
                    assert llm.core.log.total(event) > 0, f"{event} never happened"
    assert answers[0] == answers[1]
