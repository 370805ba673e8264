"""Prebuilt GPU kernels: `sm_XX/<op>.cubin` for each architecture and `manifest.json`, which names what each contains.

The files are made from kernels_cu/ and travel with the package as data; nothing is compiled for a GPU at run time.
"""
