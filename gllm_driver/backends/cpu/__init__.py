"""The CPU backend: the ops of cpu_backend/ behind the Backend protocol. "Device memory" is host memory."""

from cpu_backend.compile import cache_dir

from .backend import CpuBackend

__all__ = ["CpuBackend", "cache_dir"]
