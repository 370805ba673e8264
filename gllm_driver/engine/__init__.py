"""The engine: many requests at once on one model. plan → forward → sample → commit → emit.

`async_engine` is imported where it is needed: asyncio takes a tenth of the time in which a command starts.
"""

from ..sched.request import Progress, Request
from .config import EngineConfig
from .engine import Engine
from .handle import RequestHandle

__all__ = ["Engine", "EngineConfig", "Progress", "Request", "RequestHandle"]
