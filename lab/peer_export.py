"""`python peer_export.py FILE.gguf FOLDER`: a GGUF's weights, dequantised and rounded to bfloat16, as a Hub folder.

Runs in transformers' own environment. What it loads from a GGUF it refuses to save, so the weights move into a fresh
model of the same configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source: Path, target: Path) -> None:
    """Writes config, weights, tokenizer and chat template."""
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    fresh = type(loaded)(config).to(torch.bfloat16)  # type: ignore[arg-type]
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    config.dtype = torch.bfloat16
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
