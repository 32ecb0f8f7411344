"""The default model, float32, greedy: token for token what Hugging Face transformers says, however it is batched.

Greedy equality is checked by teacher forcing: transformers reads prompt + our 64 tokens in one pass, and its most
likely next token must be ours at every position. By induction that is its own greedy continuation.
"""

import gc

import pytest
from prompts import PROMPTS

from lab.teacher import one_request
from octavo import LLM, SamplingParams
from octavo.models.decoder import record
from octavo.models.hub import resolve_model
from octavo.models.reader import read_spec
from octavo.models.weights import open_weights
from octavo.runtime.base import SamplingInputs
from octavo.runtime.reference import ReferenceRuntime

pytestmark = pytest.mark.model

NUM_TOKENS = 64
FEWER = 32  # of how an engine batches; what the tokens are is told by the 64
EVERYTHING = {"model": "smollm2", "dtype": "float32", "max_model_len": 2048}


def answers(prompts, num_tokens=FEWER, **settings):
    """Tokens per prompt and the engine's log."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    with LLM(**{**EVERYTHING, **settings}) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [o.outputs[0].token_ids for o in outputs], [o.prompt_token_ids for o in outputs], llm.core.log


@pytest.fixture(scope="module")
def native():
    tokens, prompt_ids, log = answers(PROMPTS, NUM_TOKENS, enable_prefix_caching=False)
    assert log.total("num_preempted") == log.total("prefix_hits") == 0
    assert max(r.num_running for r in log) == len(PROMPTS), "all prompts ran in one batch"
    return tokens, prompt_ids


@pytest.fixture(scope="module")
def oracle():
    """The file as transformers reads it: its own GGUF parser, dequantised to float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = resolve_model("smollm2").path
    config = transformers.LlamaConfig(**load_gguf_checkpoint(str(path))["config"])
    model = transformers.LlamaForCausalLM(config)
    parsed = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(parsed["tensors"], strict=False)
    assert unexpected == []
    assert missing in ([], ["lm_head.weight"])  # tied
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    yield torch, model.eval(), tokenizer
    del model, parsed
    gc.collect()


def test_tokens_equal_transformers(native, oracle):
    torch, model, tokenizer = oracle
    for prompt, tokens, prompt_ids in zip(PROMPTS, *native, strict=True):
        assert tokenizer(prompt)["input_ids"] == prompt_ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_ids + tokens[:-1]]), logits_to_keep=NUM_TOKENS).logits[0]
        assert logits.argmax(-1).tolist() == tokens, f"differs on {prompt[:40]!r}"


@pytest.mark.parametrize(
    ("settings", "events"),
    [
        ({"max_num_seqs": 1}, []),
        ({"enable_prefix_caching": True}, ["prefix_hits"]),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 16}, ["num_chunked"]),
        ({"max_num_batched_tokens": 512, "enable_prefix_caching": False}, ["num_chunked"]),
        (
            {
                "admission_headroom": 0.0,
                "num_gpu_blocks_override": 72,
                "max_model_len": 1152,
                "enable_prefix_caching": False,
            },
            ["num_preempted", "num_recomputed_tokens"],
        ),
        (
            {
                "admission_headroom": 0.0,
                "num_gpu_blocks_override": 72,
                "max_model_len": 1152,
                "max_num_batched_tokens": 48,
                "max_num_seqs": 24,
            },
            ["num_preempted", "num_chunked", "prefix_hits"],
        ),
    ],
    ids=["one by one", "prefix cache", "chunks of 16", "chunks of 512", "preemption", "everything"],
)
def test_batching_never_changes_a_token(native, settings, events):
    every = 3 if settings.get("max_num_seqs") == 1 else 1  # alone they take longest, and all are alike
    tokens, _, log = answers(PROMPTS[::every], **settings)
    for event in events:
        assert log.total(event) > 0, f"{event} never happened"
    assert tokens == [whole[:FEWER] for whole in native[0][::every]]


@pytest.mark.parametrize(
    "types",
    [
        {},
        {"dtype": "quantized", "kv_cache_dtype": "int8"},
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "int8"},
        {"kv_cache_dtype": "float32"},
    ],
    ids=str,
)
def test_same_bits_in_every_number_type(types):
    """Narrow weights and narrow KV keep the promise: alone, or chunked, preempted and sharing prefixes, same tokens."""
    types = {"dtype": "auto"} | types
    prompts = PROMPTS[10:]
    alone, _, _ = answers(prompts[::2], **types, max_num_seqs=1, enable_prefix_caching=False)
    crowd, _, log = answers(
        prompts,
        **types,
        admission_headroom=0.0,
        num_gpu_blocks_override=48,
        max_model_len=768,
        max_num_batched_tokens=48,
        max_num_seqs=24,
    )
    for event in ("num_preempted", "num_chunked", "prefix_hits"):
        assert log.total(event) > 0, f"{event} never happened"
    assert crowd[::2] == alone


def test_reference_runtime_gives_the_same_tokens(native):
    """Teacher forcing again, straight on the runtime: all 64 positions of a prompt in one step."""
    files = resolve_model("smollm2")
    spec = read_spec(files, max_model_len=2048)
    runtime = ReferenceRuntime()
    sizes = {"max_num_tokens": 2048, "max_num_logits": NUM_TOKENS, "max_num_requests": 1}
    runtime.load(record(spec), open_weights(files, spec), dtype="float32", **sizes)
    runtime.allocate_kv(128, 16)
    for prompt, tokens, prompt_ids in zip(PROMPTS, *native, strict=True):
        forced = one_request(prompt_ids + tokens[:-1], first_logits=len(prompt_ids) - 1)
        runtime.execute(forced)
        assert runtime.sample(SamplingInputs.greedy(NUM_TOKENS)).token_ids.tolist() == tokens, (
            f"differs on {prompt[:40]!r}"
        )


def test_one_foreign_call_per_step():
    _, _, log = answers(PROMPTS[:4])
    assert [r.num_foreign_calls for r in log] == [1] * len(log)
    assert all(0 < r.foreign_seconds < r.execute_seconds for r in log)


def test_beam_search_equals_transformers(oracle):
    torch, model, _ = oracle
    prompts, width, num_tokens = PROMPTS[:10], 3, 12
    with LLM(**EVERYTHING) as llm:
        params = SamplingParams(use_beam_search=True, n=width, max_tokens=num_tokens)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.core.log.total("num_forked") > 0
        eos = sorted(llm.core.info.spec.eos_token_ids)
    for output in outputs:
        ids = output.prompt_token_ids
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([ids]), num_beams=width, num_return_sequences=width, max_new_tokens=num_tokens,
                do_sample=False, eos_token_id=eos, pad_token_id=eos[0],
            )[:, len(ids) :].tolist()  # fmt: skip
        for answer, tokens in zip(output.outputs, expected, strict=True):
            padding = [eos[0]] * (len(tokens) - len(answer.token_ids))
            assert answer.token_ids + padding == tokens, f"differs on {output.prompt[:40]!r}"
