"""Large language models in Python at the speed of the hardware, with nothing to install but a driver.

    import gllm_driver as gllm

    with gllm.load("path/to/model") as llm:
        print(llm.generate("def fibonacci(n):").text)

Importing this package is cheap: numba, CUDA and tokenizers are loaded when they are first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.select import DeviceInfo, devices
    from .engine import Engine, Request, RequestHandle
    from .engine.async_engine import AsyncEngine
    from .errors import GllmError
    from .evaluation import ComparisonResult, PerplexityResult, compare, perplexity
    from .generation import AsyncTextStream, GenerationResult, TextStream, Timings
    from .llm import LLM, load
    from .metrics import Metrics

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "AsyncTextStream",
    "ComparisonResult",
    "DeviceInfo",
    "Engine",
    "GenerationResult",
    "GllmError",
    "Metrics",
    "PerplexityResult",
    "Request",
    "RequestHandle",
    "TextStream",
    "Timings",
    "__version__",
    "compare",
    "devices",
    "load",
    "perplexity",
]

_HOMES = {
    "LLM": "llm",
    "load": "llm",
    "AsyncTextStream": "generation",
    "GenerationResult": "generation",
    "TextStream": "generation",
    "Timings": "generation",
    "AsyncEngine": "engine.async_engine",
    "Engine": "engine",
    "Request": "engine",
    "RequestHandle": "engine",
    "Metrics": "metrics",
    "DeviceInfo": "backends.select",
    "devices": "backends.select",
    "GllmError": "errors",
    "ComparisonResult": "evaluation",
    "PerplexityResult": "evaluation",
    "compare": "evaluation",
    "perplexity": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
