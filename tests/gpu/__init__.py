"""The CUDA tests on a machine with a GPU: `python -m tests.gpu` (README.md)."""
