"""What it costs to render a chat template in its own process: microseconds a chat, against rendering it here.

python tools/bench_templates.py [MODEL]     prints a table: median and 99th percentile of some hundred renderings
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from octavo.config import EngineConfig
from octavo.engine.template import TemplateRenderer
from octavo.models.hub import resolve_model
from octavo.text.load import load_text

ROUNDS = 400
CASES = {"1 message of 50 characters": (1, 50), "20 messages of 500": (20, 500), "100 messages of 5,000": (100, 5000)}


async def main(model: str) -> None:
    """Measures, and checks that both give the same."""
    template = load_text(EngineConfig(model=model), resolve_model(model)).chat_template
    assert template is not None, f"{model} has no chat template"
    renderer = TemplateRenderer()
    began = time.perf_counter()
    await renderer.start()
    await renderer.render(template, [{"role": "user", "content": "x"}], {})
    print(f"{model}, {Path(sys.executable).name}; process ready after {1e3 * (time.perf_counter() - began):.0f} ms")
    print(f"{'microseconds a chat':30} {'here':>8} {'p99':>8} {'apart':>8} {'p99':>8} {'front CPU':>10}")
    for name, (count, size) in CASES.items():
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": "lorem ipsum "[: size % 12] + "x" * size} for i in range(count)]
        variables = {"tools": None, "add_generation_prompt": True}
        here, apart = [], []
        cpu = 0.0
        for _ in range(ROUNDS):
            at = time.perf_counter()
            expected = template.render(messages)
            here.append(time.perf_counter() - at)
            at, cpu_at = time.perf_counter(), time.process_time()
            got = await renderer.render(template, messages, variables)
            apart.append(time.perf_counter() - at)
            cpu += time.process_time() - cpu_at
            assert got == expected
        row = [*_quantiles(here), *_quantiles(apart), 1e6 * cpu / ROUNDS]
        print(f"{name:30} " + " ".join(f"{value:8.0f}" for value in row[:4]) + f" {row[4]:10.0f}")
    await renderer.close()


def _quantiles(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    return 1e6 * ordered[len(ordered) // 2], 1e6 * ordered[len(ordered) * 99 // 100]


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "smollm2"))
