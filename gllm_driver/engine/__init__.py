"""The engine: many requests at once on one model. plan → forward → sample → commit → emit."""

from ..sched.request import Progress, Request
from .async_engine import AsyncEngine, AsyncHandle
from .core import EngineConfig
from .engine import Engine
from .handle import RequestHandle

__all__ = ["AsyncEngine", "AsyncHandle", "Engine", "EngineConfig", "Progress", "Request", "RequestHandle"]
