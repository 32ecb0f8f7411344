"""The offline engine where only numpy and tokenizers are: a machine with a card often has no network and no more."""

import json
import subprocess
import sys

from tests.tiny_llama import TINY

SCRIPT = """
import sys

for name in ("msgspec", "pydantic", "fastapi", "uvicorn", "gguf", "llguidance", "typer", "huggingface_hub",
             "prometheus_client"):
    sys.modules[name] = None  # importing it fails
from octavo import LLM, SamplingParams

llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, runtime="reference", num_gpu_blocks_override=6,
          max_model_len=64, admission_headroom=0.0)
params = SamplingParams(max_tokens=20, ignore_eos=True)
outputs = llm.generate(None, params, [[5] * 25, [7] * 25, [9] * 25], use_tqdm=False)
assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 20, 20]
import octavo.models.safetensors_weights  # what a checkpoint is read with
print("preempted", int(llm.core.log.total("num_preempted")))
"""


def test_it_generates_without_what_serving_needs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split("preempted ")[1]) > 0
