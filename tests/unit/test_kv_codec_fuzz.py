"""A short run of the fuzz of stored KV's decoder; `python -m tests.fuzz_kv_codec 1000000` is the long one."""

from __future__ import annotations

from fuzz_kv_codec import fuzz


def test_no_bytes_get_through_the_decoder() -> None:
    outcomes = fuzz(5000)
    assert outcomes.keys() >= {"truncated", "checksum", "header", "magic", "key", "version", "model", "compression"}
