"""The CUDA backend: the ops of kernels_cu/ behind the Backend protocol, through the driver alone."""

from .backend import CudaBackend

__all__ = ["CudaBackend"]
