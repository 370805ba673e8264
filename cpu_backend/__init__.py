"""The CPU backend's kernels: one numba file per op, a SIMD vocabulary, and the compiler that turns them into objects.

Importing this package imports no numba: compiled kernels are cached as machine code and loaded through llvmlite alone.
"""
