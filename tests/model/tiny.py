"""Tiny random checkpoints of every architecture row, made with transformers; every parameter is randomised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from octavo.models.decoder import record
from octavo.models.reader import read_spec
from octavo.models.spec import ModelFiles, ModelSpec
from octavo.models.weights import open_weights
from octavo.runtime.base import Float32, Runtime, SamplingInputs, StepInputs
from octavo.runtime.reference import ReferenceRuntime

torch.set_num_threads(1)

_COMMON = {
    "vocab_size": 101,  # odd, and no multiple of any tile
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# In each the feature that sets the row apart bites: windows are shorter than the prompts, head_dim is not
# hidden_size / heads, biases and norms are random.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_COMMON, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5}),
    "mistral": ("Mistral", {**_COMMON, "sliding_window": 7, "head_dim": 16}),
    "qwen2": ("Qwen2", {**_COMMON, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**_COMMON, "head_dim": 20, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {**_COMMON, "sliding_window": 7, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2moe": (
        "Qwen2Moe",
        {
            **_COMMON,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 28,
            "shared_expert_intermediate_size": 44,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3moe": (
        "Qwen3Moe",
        {
            **_COMMON,
            "head_dim": 20,
            "num_experts": 9,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **_COMMON,
            "head_dim": 24,
            "sliding_window": 5,
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 20,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1_000_000.0},
            },
        },
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": 101, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "eos_token_id": 2},
    ),
    "opt": (
        "OPT",
        {
            **{k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")},
            "ffn_dim": 72,
            "word_embed_proj_dim": 48,
        },
    ),
}
ARCHITECTURES = tuple(_CONFIGS)


def make_tiny(architecture: str, folder: Path, *, dtype: str = "float32", **overrides: Any) -> ModelFiles:
    """Writes a checkpoint of a row to `folder` and returns its files; equal arguments make equal weights.

    `overrides` change config fields; `dtype` is how the tensors are stored.
    """
    class_name, fields = _CONFIGS[architecture]
    config_name = f"{class_name}TextConfig" if architecture == "gemma3" else f"{class_name}Config"
    config = getattr(transformers, config_name)(**{**fields, **overrides})
    causal = "GPT2LMHeadModel" if architecture == "gpt2" else f"{class_name}ForCausalLM"
    model = getattr(transformers, causal)(config)
    randomise(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return ModelFiles(name=str(folder), format="hf", path=folder)


def randomise(model: torch.nn.Module) -> None:
    """Gives every parameter random values, norms and biases too, large enough for logits that differ."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.dim() == 1 and "bias" not in name and "gemma" not in type(model).__name__.lower()
        parameter.data = 1 + 0.3 * noise if is_norm else noise * (0.1 if parameter.dim() == 1 else 0.25)


def load_oracle(files: ModelFiles) -> Any:
    """The same checkpoint in transformers, float32, eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        files.path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def oracle_logits(model: Any, token_ids: list[int]) -> Float32:
    """Logits of every position, without a cache: [len(token_ids), vocab]."""
    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].float().numpy()


def reference() -> Runtime:
    """A new reference runtime."""
    return ReferenceRuntime()


def native() -> Runtime:
    """A new native runtime on one thread; skips the test where the library is not built."""
    module = pytest.importorskip("octavo.runtime.native")
    if not hasattr(module, "NativeRuntime"):
        pytest.skip("the native runtime is not there")
    return module.NativeRuntime(1)


def runtimes() -> list[Any]:
    """Factories of every runtime, for parametrize."""
    return [pytest.param(reference, id="reference"), pytest.param(native, id="native")]


class Engine:
    """The smallest engine: requests with interleaved blocks in one paged pool, greedy, no scheduler."""

    def __init__(
        self,
        make_runtime: Callable[[], Runtime],
        files: ModelFiles,
        *,
        max_model_len: int | None = None,
        dtype: str = "float32",
        block_size: int = 4,
        load_format: str = "auto",
    ) -> None:
        self.spec: ModelSpec = read_spec(files, max_model_len=max_model_len)
        self.block_size = block_size
        self.runtime = make_runtime()
        self.runtime.load(
            record(self.spec),
            open_weights(files, self.spec, load_format=load_format),
            dtype=dtype,
            max_num_tokens=256,
            max_num_logits=256,
            max_num_requests=8,
        )
        self._blocks_per_request = -(-self.spec.max_model_len // block_size)
        self.runtime.allocate_kv(8 * self._blocks_per_request, block_size)

    def table(self, request: int) -> np.ndarray:
        """Blocks of a request: every eighth of the pool, descending, so that neighbours are strangers."""
        return np.arange(self._blocks_per_request, dtype=np.int32)[::-1] * 8 + request

    def step(self, chunks: list[tuple[int, int, list[int]]]) -> Float32:
        """Runs one step of (request, first position, token ids) and returns the logits of every token."""
        counts = [len(ids) for _, _, ids in chunks]
        positions = np.concatenate([np.arange(start, start + len(ids)) for _, start, ids in chunks])
        owners = np.repeat([request for request, _, _ in chunks], counts)
        tables = np.stack([self.table(request) for request, _, _ in chunks])
        blocks = np.array([self.table(r)[p // self.block_size] for r, p in zip(owners, positions, strict=True)])
        inputs = StepInputs(
            token_ids=np.concatenate([ids for _, _, ids in chunks]).astype(np.int32),
            positions=positions.astype(np.int32),
            slots=(blocks.astype(np.int64) * self.block_size + positions % self.block_size)[None],
            query_start_loc=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
            seq_lens=np.array([start + len(ids) for _, start, ids in chunks], dtype=np.int32),
            block_tables=np.ascontiguousarray(tables[None]),
            logits_indices=np.arange(len(positions), dtype=np.int32),
        )
        self.runtime.execute(inputs)
        self.runtime.sample(SamplingInputs.greedy(len(positions)))
        return self.runtime.logits()

    def generate(self, prompts: list[list[int]], num_tokens: int, chunk: int) -> tuple[list[list[int]], list[Float32]]:
        """Greedy tokens of each prompt, and the logits of all its positions; all requests run in the same steps."""
        texts = [list(p) for p in prompts]
        computed = [0] * len(prompts)
        logits: list[list[Float32]] = [[] for _ in prompts]
        goals = [len(p) + num_tokens for p in prompts]
        while any(len(t) < goal for t, goal in zip(texts, goals, strict=True)):
            active = [r for r in range(len(texts)) if len(texts[r]) < goals[r]]
            chunks = [(r, computed[r], texts[r][computed[r] : computed[r] + chunk]) for r in active]
            rows = self.step(chunks)
            for request, start, ids in chunks:
                mine, rows = rows[: len(ids)], rows[len(ids) :]
                logits[request].append(mine)
                computed[request] = start + len(ids)
                if computed[request] == len(texts[request]):
                    texts[request].append(int(mine[-1].argmax()))
        out = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
        return out, [np.concatenate(rows) for rows in logits]
