"""Octavo: an LLM serving engine that an engineer reads in an afternoon.

    from octavo import LLM, SamplingParams
    llm = LLM("smollm2")
    print(llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].outputs[0].text)

The public names are those below; each is loaded when it is first used, so `import octavo` costs milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = {
    "octavo.engine.llm": ("LLM",),
    "octavo.engine.async_engine": ("AsyncEngine",),
    "octavo.config": ("EngineConfig",),
    "octavo.sampling_params": ("SamplingParams", "BeamSearchParams", "PoolingParams", "RequestOutputKind"),
    "octavo.outputs": ("RequestOutput", "CompletionOutput", "Logprob", "BeamSearchOutput", "BeamSearchSequence"),
    "octavo.errors": ("OctavoError",),
}
_WHERE = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "OctavoError",
    "PoolingParams",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
]

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.engine.async_engine import AsyncEngine
    from octavo.engine.llm import LLM
    from octavo.errors import OctavoError
    from octavo.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, Logprob, RequestOutput
    from octavo.sampling_params import BeamSearchParams, PoolingParams, RequestOutputKind, SamplingParams


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'octavo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
