"""A script written for vLLM's offline LLM runs after its import is changed, and gives what it would expect there."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from octavo.errors import RequestError

pytestmark = pytest.mark.model

SCRIPT = """
from functools import partial

from tqdm import tqdm
from vllm import LLM, SamplingParams

prompts = ["Hello, my name is", "The capital of France is", "The future of paper is"]
llm = LLM(
    model="smollm2", dtype="auto", max_model_len=512, max_num_seqs=8, gpu_memory_utilization=0.9, seed=0,
    tensor_parallel_size=1, enforce_eager=True, enable_prefix_caching=True,
)
greedy = SamplingParams(temperature=0, max_tokens=8)

outputs = llm.generate(prompts, greedy)
lines = [f"Prompt: {o.prompt!r}, Generated text: {o.outputs[0].text!r}" for o in outputs]

ids = [{"prompt_token_ids": o.prompt_token_ids} for o in outputs]
from_ids = llm.generate(ids, sampling_params=greedy, use_tqdm=False)
from_dicts = llm.generate([{"prompt": p} for p in prompts], greedy, use_tqdm=False)

many = [SamplingParams(temperature=0, max_tokens=k) for k in (1, 2, 3)]
lengths = [len(o.outputs[0].token_ids) for o in llm.generate(prompts, many, use_tqdm=False)]

sampled = SamplingParams(n=3, temperature=0.9, top_p=0.95, seed=7, max_tokens=6)
several, again = (llm.generate(prompts[0], sampled, use_tqdm=False)[0] for _ in range(2))

until_dot = SamplingParams(temperature=0, max_tokens=32, stop=["."])
stopped = llm.generate(prompts[1], until_dot, use_tqdm=False)[0].outputs[0]
with_dot = SamplingParams(temperature=0, max_tokens=32, stop=["."], include_stop_str_in_output=True)
kept = llm.generate(prompts[1], with_dot, use_tqdm=False)[0].outputs[0]

scored = llm.generate(prompts[1], SamplingParams(temperature=0, max_tokens=4, logprobs=3), use_tqdm=False)[0].outputs[0]

messages = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": [{"type": "text", "text": "Say hello"}]},
]
talk = llm.chat(messages, greedy, use_tqdm=False)
talks = llm.chat([messages, messages[1:]], sampling_params=greedy, use_tqdm=False)
open_end = [*messages, {"role": "assistant", "content": "Hello, my"}]
continued = llm.chat(open_end, greedy, add_generation_prompt=False, continue_final_message=True, use_tqdm=False)

recommended = llm.get_default_sampling_params()
recommended.max_tokens = 2
defaults = llm.generate(prompts, recommended, use_tqdm=partial(tqdm, disable=True))
pieces = llm.get_tokenizer().decode(outputs[1].outputs[0].token_ids)
"""


@pytest.fixture(scope="module")
def ran():
    """The names of the script after it ran."""
    names: dict = {}
    exec(compile(SCRIPT.replace("from vllm import", "from octavo import"), "vllm_script.py", "exec"), names)
    yield names
    names["llm"].close()


def texts(outputs):
    return [o.outputs[0].text for o in outputs]


def test_outputs_have_their_prompts_and_order(ran):
    assert [o.prompt for o in ran["outputs"]] == ran["prompts"]
    assert [o.request_id for o in ran["outputs"]] == ["0", "1", "2"]
    assert all(o.finished for o in ran["outputs"])
    assert "Paris" in ran["lines"][1]
    assert ran["pieces"] == ran["outputs"][1].outputs[0].text


def test_token_ids_and_mappings_are_prompts_too(ran):
    assert texts(ran["from_ids"]) == texts(ran["from_dicts"]) == texts(ran["outputs"])
    assert ran["from_ids"][0].prompt is None


def test_one_sampling_params_for_each_prompt(ran):
    assert ran["lengths"] == [1, 2, 3]


def test_n_answers_with_a_seed(ran):
    answers = [c.text for c in ran["several"].outputs]
    assert [c.index for c in ran["several"].outputs] == [0, 1, 2]
    assert len(set(answers)) > 1
    assert answers == [c.text for c in ran["again"].outputs]


def test_stop_strings(ran):
    stopped, kept = ran["stopped"], ran["kept"]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", ".")
    assert "." not in stopped.text
    assert kept.text == stopped.text + "."
    assert kept.token_ids == stopped.token_ids


def test_logprobs(ran):
    scored = ran["scored"]
    assert scored.token_ids == [next(iter(entry)) for entry in scored.logprobs]
    assert all(entry[token].rank == 1 for token, entry in zip(scored.token_ids, scored.logprobs, strict=True))
    assert "".join(e[t].decoded_token for t, e in zip(scored.token_ids, scored.logprobs, strict=True)) == scored.text
    total = sum(entry[token].logprob for token, entry in zip(scored.token_ids, scored.logprobs, strict=True))
    assert scored.cumulative_logprob == pytest.approx(total)


def test_chat(ran):
    assert texts(ran["talks"])[0] == texts(ran["talk"])[0]
    assert "Say hello" in ran["talk"][0].prompt
    assert ran["continued"][0].prompt.endswith("Hello, my")


def test_default_sampling_and_a_callable_bar(ran):
    assert [len(o.outputs[0].token_ids) for o in ran["defaults"]] == [2, 2, 2]


def test_a_bar_shows_requests_and_tokens_per_second(ran, capsys):
    ran["llm"].generate(ran["prompts"], ran["greedy"])
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "tok/s" in shown


def test_what_is_wrong_is_refused_and_harms_no_later_call(ran):
    llm, greedy = ran["llm"], ran["greedy"]
    before = texts(ran["outputs"])
    wrong = [
        lambda: llm.generate(["fine", ""], greedy),
        lambda: llm.generate(["a", "b"], [greedy]),
        lambda: llm.generate([[1, 10**6]], greedy),
        lambda: llm.generate("x" * 10**6, greedy),
        lambda: llm.generate(5, greedy),
        lambda: llm.generate("lone \ud800", greedy),
        lambda: llm.generate(b"bytes", greedy),
        lambda: llm.generate("fine", {"temperature": 0}),
        lambda: llm.generate("fine", [None]),
        lambda: llm.generate("fine", 5),
        *(lambda ids=ids: llm.generate(prompt_token_ids=ids) for ids in ([None], 5, "12", [[[1]]])),
        lambda: llm.chat(None, greedy),
        lambda: llm.embed("fine", greedy),
        lambda: llm.beam_search("fine", greedy),
        lambda: llm.chat([{"role": "user", "content": "fine"}, "oops"], greedy),
        lambda: llm.chat([{"role": "user", "content": [{"type": "image_url"}]}], greedy),
        lambda: llm.chat([[]], greedy),
        lambda: llm.chat(ran["messages"], greedy, continue_final_message=True),
    ]
    for call in wrong:
        with pytest.raises(RequestError):
            call()
    interrupted = partial(llm.generate, ran["prompts"], greedy, use_tqdm=_raises)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert texts(llm.generate(ran["prompts"], greedy, use_tqdm=False)) == before


def test_calls_from_several_threads_take_turns(ran):
    """In one step at once they would write to the same buffers."""
    ask = partial(ran["llm"].generate, sampling_params=ran["greedy"], use_tqdm=False)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, ran["prompts"]))
    assert [texts(answer) for answer in answers] == [[text] for text in texts(ran["outputs"])]


def _raises(**_):
    raise KeyboardInterrupt
