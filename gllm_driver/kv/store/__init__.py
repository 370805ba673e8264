"""KV of prompts kept beyond a request and a process: in memory, on disk, in Redis (docs/kv-store.md).

A store is a cache of untrusted bytes. Whatever goes wrong is a miss and a counter; wrong KV is never handed out.
"""

from __future__ import annotations

from .base import REASONS, KvEntry, KvStore, StoredEntry, StoreStats, VerifyReport
from .codec import Codec
from .keys import CHUNK_TOKENS, KvChunkKey, KvLayout, KvRoot, chunk_keys
from .memory import MemoryStore
from .spec import open_store

__all__ = [
    "CHUNK_TOKENS",
    "REASONS",
    "Codec",
    "KvChunkKey",
    "KvEntry",
    "KvLayout",
    "KvRoot",
    "KvStore",
    "MemoryStore",
    "StoreStats",
    "StoredEntry",
    "VerifyReport",
    "chunk_keys",
    "open_store",
]
