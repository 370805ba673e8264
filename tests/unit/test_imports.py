"""Who may import whom (docs/architecture.md), read from the sources, and what a bare import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Lowest first. A package may import from those below it; the first row's may also import each other.
LAYERS = (
    {"errors", "types", "packed_types", "config"},
    {"ops"},
    {"cpu_backend", "driver", "launch", "quant"},
    {"backends"},
    {"models", "kv"},
    {"loaders"},
    {"convert", "sched", "metrics", "text", "demo"},
    {"engine"},
    {"distillation", "embedding", "generation"},
    {"placement", "prompts"},
    {"llm"},
    {"evaluation"},
    {"__init__"},
    {"serve", "cli"},
    {"__main__"},
)
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
HEAVY = ("numba", "llvmlite", "cuda", "tokenizers", "gguf", "torch", "jinja2", "huggingface_hub")


@dataclass(frozen=True)
class Import:
    """`module` imports `target` (both dotted), at the top of the file or inside a function."""

    module: str
    target: str
    lazy: bool


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import statement of a file; `from . import a` counts as the module a."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join(base + ([node.module] if node.module else []))
            targets = [f"{prefix}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            yield Import(module, target, id(node) in inside)


def house() -> list[Import]:
    found: list[Import] = []
    for top in ("gllm_driver", "cpu_backend"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            found += imports_of(path.read_text(encoding="utf-8"), module, is_package=is_package)
    return found


def package_of(dotted: str) -> str | None:
    """The row of LAYERS a module of ours belongs to; None for other people's modules."""
    top, _, rest = dotted.partition(".")
    if top == "cpu_backend":
        return top
    if top != "gllm_driver":
        return None
    first = rest.split(".")[0]
    return first if first in LEVEL else "__init__" if not first or not (ROOT / top / first).exists() else first


def breach(imported: Import) -> str | None:
    """What is wrong with one import, if anything."""
    source, target = package_of(imported.module), package_of(imported.target)
    arrow = f"{imported.module} imports {imported.target}"
    if target is not None:
        if source not in LEVEL or target not in LEVEL:
            return f"{arrow}: say in LAYERS where the new package belongs"
        if source != target and LEVEL[target] >= max(LEVEL[source], 1):
            return f"{arrow}: {target} is not below {source}"
        names = imported.target.split(".")
        is_cpu_backend = f"{imported.module}.".startswith("gllm_driver.backends.cpu.")
        if target == "cpu_backend" and source != target and not is_cpu_backend:
            return f"{arrow}: only backends/cpu/ may"
        is_backend = names[1:2] == ["backends"] and names[2:3] in (["cpu"], ["cuda"])
        if is_backend and f"{imported.module}.".startswith(f"gllm_driver.backends.{names[2]}."):
            return None  # the package's own modules
        if is_backend and imported.module != "gllm_driver.backends.select":
            return f"{arrow}: only backends/select.py may"
        if is_backend and not imported.lazy:
            return f"{arrow}: must be lazy"
    elif imported.target.split(".")[0] == "cuda":
        if source != "driver":
            return f"{arrow}: only driver/ may"
        if not imported.target.startswith("cuda.bindings.driver"):
            return f"{arrow}: nothing of CUDA but cuda.bindings.driver"
    elif source == "ops" and imported.target.split(".")[0] not in {*sys.stdlib_module_names, "numpy"}:
        return f"{arrow}: ops need numpy alone"
    return None


def test_imports_point_down() -> None:
    imports = house()
    assert len(imports) > 100
    assert [b for i in imports if (b := breach(i))] == []


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("gllm_driver.ops.linear", "from ..quant.formats import FORMATS", "quant is not below ops"),
        ("gllm_driver.ops.linear", "import numba", "ops need numpy alone"),
        ("gllm_driver.types", "from . import ops", "ops is not below types"),
        ("gllm_driver.quant.formats", "import cpu_backend.simd", "cpu_backend is not below quant"),
        ("gllm_driver.models.decoder", "from ..backends.cpu import CpuBackend", "only backends/select.py may"),
        ("gllm_driver.models.decoder", "def f():\n    from cpu_backend import simd", "only backends/cpu/ may"),
        ("gllm_driver.backends.select", "from . import cpu", "must be lazy"),
        ("gllm_driver.backends.cuda", "from cuda.bindings import driver", "only driver/ may"),
        ("gllm_driver.driver.device", "from cuda.bindings import runtime", "nothing of CUDA but"),
        ("gllm_driver.kv.pages", "from ..models import arch", "models is not below kv"),
        ("gllm_driver.errors", "import gllm_driver", "__init__ is not below errors"),
    ],
)
def test_a_breach_is_seen(module: str, source: str, problem: str) -> None:
    found = [b for i in imports_of(source, module, is_package=False) if (b := breach(i))]
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("gllm_driver.config", "from .errors import RequestError"),
        ("gllm_driver.ops.linear", "from ..types import F32\nfrom .contract import Array\nimport numpy as np"),
        ("gllm_driver.backends.select", "def f():\n    from .cpu import CpuBackend"),
        ("gllm_driver.driver.device", "from cuda.bindings import driver"),
        ("gllm_driver.cli", "from . import __version__"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert [b for i in imports_of(source, module, is_package=False) if (b := breach(i))] == []


@pytest.mark.parametrize("module", ["gllm_driver", "gllm_driver.ops", "gllm_driver.config", "gllm_driver.types"])
def test_a_bare_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "gllm_driver" in loaded
    assert loaded.isdisjoint(HEAVY)
