"""Stores as users write them: memory:2GiB,disk:/path?cap=20GiB,redis://host:6379/0?ttl=3600"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from ...errors import RequestError
from .base import KvStore
from .codec import Codec

_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for unit, base in (("iB", 1024), ("B", 1000))
    for power, prefix in enumerate(("K", "M", "G", "T"), 1)
}
_OPTIONS = {
    "memory": ("codec", "verify"),
    "disk": ("cap", "codec", "fsync"),
    "redis": ("ttl", "timeout_ms", "backoff_ms", "codec", "part", "prefix"),
}
_TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
EXAMPLE = "memory:2GiB,disk:/path?cap=20GiB,redis://host:6379/0?ttl=3600"


@dataclass(frozen=True)
class TierSpec:
    """One tier. `where`: a size for memory, a path for disk, a URL without our options for Redis."""

    kind: str  # memory, disk, redis
    where: str
    options: dict[str, str]
    codec: Codec

    @property
    def name(self) -> str:
        """For messages: without a password."""
        if self.kind != "redis":
            return f"{self.kind}:{self.where}"
        url = urlsplit(self.where)
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"

    def size(self, option: str, default: str) -> int:
        return parse_size(self.options.get(option, default), f"{self.kind} option {option}")

    def number(self, option: str, default: int, low: int, high: int) -> int:
        text = self.options.get(option, str(default))
        if not re.fullmatch(r"\d{1,15}", text, re.ASCII) or not low <= int(text) <= high:
            raise RequestError(f"KV store: {self.kind} option {option} is a whole number {low} … {high}, got {text!r}")
        return int(text)

    def flag(self, option: str, default: bool) -> bool:
        text = self.options.get(option, str(int(default)))
        if text not in ("0", "1"):
            raise RequestError(f"KV store: {self.kind} option {option} is 0 or 1, got {text!r}")
        return text == "1"


def open_store(spec: str, *, deterministic: bool = False) -> KvStore:
    """The store a specification describes, tiers from fast to slow. Raises RequestError, one line, for mistakes in it.

    A server or a directory that cannot be reached is no mistake of the specification: it costs misses.
    deterministic: refuse codecs that change numbers.
    """
    from .tiered import TieredStore

    tiers = parse_spec(spec, deterministic=deterministic)
    # Where one tier quantizes, KV computed after it is not what others compute: none of it is for readers without.
    namespace = "".join(sorted({f"-{tier.codec.quantization}" for tier in tiers if tier.codec.is_lossy}))
    stores: list[KvStore] = []
    try:
        for tier in tiers:
            stores.append(_open(tier, namespace))  # noqa: PERF401 - what was opened must be closed if one fails
    except BaseException:
        for store in stores:
            store.close()
        raise
    return stores[0] if [tier.kind for tier in tiers] == ["memory"] else TieredStore(stores)


def _open(tier: TierSpec, namespace: str) -> KvStore:
    if tier.kind == "memory":
        from .memory import MemoryStore

        return MemoryStore(parse_size(tier.where, "memory"), codec=tier.codec, verify=tier.flag("verify", True))
    if tier.kind == "disk":
        from .disk import DiskStore

        return DiskStore(
            Path(tier.where),
            tier.size("cap", "20GiB"),
            codec=tier.codec,
            namespace=namespace,
            fsync=tier.flag("fsync", True),
        )
    from .redis_store import RedisStore

    return RedisStore(
        tier.where,
        name=tier.name,
        codec=tier.codec,
        namespace=namespace,
        prefix=tier.options.get("prefix", "gllm"),
        ttl_s=tier.number("ttl", 24 * 3600, 0, 10 * 365 * 24 * 3600),
        timeout_s=tier.number("timeout_ms", 250, 1, 600_000) / 1000,
        backoff_s=tier.number("backoff_ms", 2000, 0, 3_600_000) / 1000,
        part_nbytes=tier.size("part", "64MiB"),
    )


def parse_spec(spec: str, *, deterministic: bool = False) -> list[TierSpec]:
    """The tiers of a specification. Raises RequestError."""
    texts = re.split(r",(?=[a-z]+:)", spec.strip())
    tiers = [_tier(text, deterministic) for text in texts]
    kinds = [tier.kind for tier in tiers]
    if "memory" in kinds[1:]:
        raise RequestError(f"KV store {spec!r}: memory is the fastest tier and comes first, once")
    for tier in tiers:
        if tiers.count(tier) > 1:
            raise RequestError(f"KV store: {tier.name} is there twice")
    return tiers


def parse_size(text: str, what: str) -> int:
    """Bytes of 512MiB, 2GiB, 20GB … Raises RequestError."""
    match = re.fullmatch(r"(\d{1,15})(\w{0,3})", text, re.ASCII)
    factor = _UNITS.get(match[2]) if match else None
    if match is None or factor is None or int(match[1]) == 0:
        raise RequestError(f"KV store: {what} needs a size such as 512MiB, 2GiB or 20GB, got {text!r}")
    return int(match[1]) * factor


def _tier(text: str, deterministic: bool) -> TierSpec:
    scheme = text.partition(":")[0]
    kind = "redis" if scheme == "rediss" else scheme
    if kind not in _OPTIONS or ":" not in text:
        shown = text.rpartition("@")[2]  # what looks like a URL may hold a password
        raise RequestError(f"KV store {shown!r} begins with none of memory:, disk:, redis://, rediss://: {EXAMPLE}")
    base, _, query = text.rpartition("?") if "?" in text else (text, "", "")
    pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)  # as in codec=int8+zstd: no space
    known = _OPTIONS[kind] + (_TLS_OPTIONS if scheme == "rediss" else ())
    for option, _ in pairs:
        if option not in known:
            raise RequestError(f"KV store: {kind} has no option {option!r}; it has {', '.join(known)}")
    options = dict(pairs)
    if len(options) < len(pairs):
        raise RequestError(f"KV store: a {kind} option is given twice")
    codec = Codec.of(options.get("codec", "none"), deterministic=deterministic)
    where = _redis_url(base, options) if kind == "redis" else base.partition(":")[2]
    if kind == "disk" and (not where or where.startswith("//")):
        raise RequestError(f"KV store: disk needs a path, as in disk:/path?cap=20GiB; got {text!r}")
    if kind == "disk":
        try:
            Path(where).expanduser()
        except RuntimeError as error:
            raise RequestError(f"KV store {text!r}: {error}") from None
    tier = TierSpec(kind, where, options, codec)
    if kind == "memory":
        parse_size(where, "memory")
    return tier


def _redis_url(base: str, options: dict[str, str]) -> str:
    """The URL that redis-py reads, with its own options."""
    try:
        url = urlsplit(base)
        is_right = base.partition(":")[2].startswith("//") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_right = False
    if not is_right or not re.fullmatch(r"(/\d{0,5})?", url.path, re.ASCII):
        shown = base.rpartition("@")[2]
        raise RequestError(f"KV store: a Redis URL is redis://[user:password@]host[:port][/database], got …{shown!r}")
    tls = "&".join(f"{name}={options[name]}" for name in _TLS_OPTIONS if name in options)
    return f"{base}?{tls}" if tls else base
