"""Ops as contracts. `CONTRACTS` lists them all; a backend implements each under the same file name."""

from __future__ import annotations

from . import (
    embedding,
    flash_attention,
    fused_gate_up_silu,
    fused_qkv_rope,
    kv_pages,
    linear,
    pack_weight,
    paged_attention,
    pool_rows,
    rms_norm,
    rope_table,
    sample,
)
from .contract import Contract

CONTRACTS: dict[str, Contract] = {
    m.CONTRACT.name: m.CONTRACT
    for m in (
        embedding,
        rms_norm,
        rope_table,
        fused_qkv_rope,
        flash_attention,
        paged_attention,
        linear,
        fused_gate_up_silu,
        sample,
        kv_pages,
        pack_weight,
        pool_rows,
    )
}
