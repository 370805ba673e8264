"""Talking to a Redis server that may be slow, silent, full, wrong or hostile: bounded in time and in bytes.

redis-py connects, authenticates, speaks TLS and parses; here lie the limits. A server that failed is left alone for a
while, so that a dead one costs at most one time-out per interval.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import RequestError, StoreError
from .base import Tally

MIN_RATE = 20e6  # bytes per second: an exchange of n bytes may take the time-out and n / MIN_RATE seconds at most
REPLY_NBYTES = 4096  # for replies without a value, and the framing of those with one
MAX_BACKOFF_S = 32.0
_READ_NBYTES = 1 << 20
_SEND_NBYTES = 1 << 18
_MAX_IDLE = 8  # connections kept for the next exchange

Command = tuple[Any, ...]


class Breaker:
    """Opens when the server fails; then one caller may try again after each interval, which doubles while it fails."""

    def __init__(self, backoff_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._backoff_s = backoff_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._closed_at = 0.0

    def allows(self) -> bool:
        with self._lock:
            if not self._failures:
                return True
            if self._clock() < self._closed_at:
                return False
            self._closed_at = self._clock() + self._interval_s()  # others wait for what this caller finds
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._failures = 0

    def failed(self) -> None:
        with self._lock:
            self._failures += 1
            self._closed_at = self._clock() + self._interval_s()

    def _interval_s(self) -> float:
        return min(self._backoff_s * 2.0 ** min(self._failures - 1, 30), max(MAX_BACKOFF_S, self._backoff_s))


class Guard:
    """What an exchange may still take."""

    def __init__(self) -> None:
        self.deadline = 0.0
        self.nbytes = 0

    def arm(self, seconds: float, nbytes: int) -> None:
        self.deadline = time.monotonic() + seconds
        self.nbytes = nbytes

    def remaining_s(self) -> float:
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the exchange took too long")
        return remaining


class GuardedSocket:
    """A socket that keeps to its guard's limits, whatever is read or sent in however many calls."""

    def __init__(self, sock: Any, guard: Guard) -> None:
        self._sock = sock
        self._guard = guard
        self._timeout_s = sock.gettimeout()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def settimeout(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._sock.settimeout(timeout_s)

    def recv(self, nbytes: int) -> bytes:
        data: bytes = self._sock.recv(self._allowed(nbytes))
        self._guard.nbytes -= len(data)
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0) -> int:
        count: int = self._sock.recv_into(buffer, self._allowed(nbytes or len(buffer)))
        self._guard.nbytes -= count
        return count

    def sendall(self, data: Any) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _SEND_NBYTES):
            self._hurry()
            self._sock.sendall(view[start : start + _SEND_NBYTES])

    def _allowed(self, nbytes: int) -> int:
        if self._guard.nbytes <= 0:
            raise OSError("the server sends more than was asked for")
        self._hurry()
        return min(nbytes, self._guard.nbytes)

    def _hurry(self) -> None:
        if self._timeout_s != 0:  # 0: redis-py only looks whether something is there
            remaining_s = self._guard.remaining_s()
            self._sock.settimeout(remaining_s if self._timeout_s is None else min(self._timeout_s, remaining_s))


class Link:
    """Exchanges with one server. Every failure is a StoreError, counted by the caller. Thread-safe."""

    def __init__(self, url: str, timeout_s: float, backoff_s: float, tally: Tally) -> None:
        """Connects to nothing yet. Raises RequestError when redis-py is not installed or does not take the URL."""
        if importlib.util.find_spec("redis") is None:
            raise RequestError("KV stores in Redis need the package redis: pip install 'gllm-driver[redis]'")
        from redis.connection import parse_url

        try:
            self._options = dict(parse_url(url))
        except ValueError as error:
            raise RequestError(f"KV store {tally.name}: {error}") from error
        self._class = _connection_class(self._options.pop("connection_class", None))
        self._timeout_s = timeout_s
        self._breaker = Breaker(backoff_s)
        self._lock = threading.Lock()
        self._idle: list[Any] = []
        self._pid = os.getpid()
        self._is_closed = False

    def call(self, commands: Sequence[Command], *, nbytes: int = 0) -> list[Any]:
        """Replies to commands sent together; an error reply is a StoreError in its place. `nbytes`: of values, at most.

        Raises StoreError: down, timeout, unreachable, auth, reply.
        """
        if not self._breaker.allows():
            raise StoreError("down", "the server failed a moment ago")
        connection = self._take()
        try:
            sent = sum(len(part) for command in commands for part in command if isinstance(part, (bytes, memoryview)))
            connection.guard.arm(
                self._timeout_s + (nbytes + sent) / MIN_RATE, nbytes + REPLY_NBYTES * (len(commands) + 4)
            )
            replies = self._exchange(connection, commands)
        except StoreError:
            self._breaker.failed()
            self._drop(connection)
            raise
        except BaseException:  # an interrupt in the middle of a reply
            self._drop(connection)
            raise
        self._breaker.succeeded()
        self._give_back(connection)
        return replies

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            self._drop(connection)

    def _exchange(self, connection: Any, commands: Sequence[Command]) -> list[Any]:
        from redis import exceptions

        try:
            connection.send_packed_command(connection.pack_commands(commands))
            return [_reply(connection) for _ in commands]
        except (exceptions.TimeoutError, TimeoutError) as error:
            raise StoreError("timeout", f"no answer within {self._timeout_s * 1000:.0f} ms") from error
        except (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError) as error:
            raise StoreError("auth", _printable(error)) from error
        except (exceptions.ConnectionError, OSError) as error:
            raise StoreError("unreachable", _printable(error)) from error
        except (exceptions.RedisError, *_NONSENSE) as error:
            raise StoreError("reply", _printable(error)) from error

    def _take(self) -> Any:
        with self._lock:
            if self._pid != os.getpid():  # a fork shares its parent's sockets: leave them to it
                self._idle, self._pid = [], os.getpid()
            if self._idle:
                return self._idle.pop()
        connection = self._class(
            **self._options,
            socket_timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s,
            socket_read_size=_READ_NBYTES,
        )
        connection.guard = Guard()
        return connection

    def _give_back(self, connection: Any) -> None:
        with self._lock:
            if not self._is_closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        self._drop(connection)

    def _drop(self, connection: Any) -> None:
        with contextlib.suppress(OSError):
            connection.disconnect()


# What a parser may trip over when bytes are no replies.
_NONSENSE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, MemoryError, OverflowError)


def _reply(connection: Any) -> Any:
    """One reply. Error replies end a command, not the exchange, unless they are about the user."""
    from redis import exceptions

    try:
        return connection.read_response()
    except exceptions.NoPermissionError:
        raise
    except exceptions.ResponseError as error:
        text = _printable(error)
        is_full = isinstance(error, exceptions.OutOfMemoryError) or "maxmemory" in text
        return StoreError("full" if is_full else "reply", text)


def _printable(error: BaseException) -> str:
    """One short line: a server may say anything."""
    return "".join(c if c.isprintable() else "?" for c in str(error) or type(error).__name__)[:200]


def _connection_class(base: Any) -> Any:
    """redis-py's connection with guarded sockets."""
    from redis.connection import Connection

    parent = base or Connection

    class Guarded(parent):  # type: ignore[misc, valid-type]
        guard: Guard

        def _connect(self) -> GuardedSocket:
            return GuardedSocket(_in_time(super()._connect, self.guard.remaining_s()), self.guard)

    return Guarded


def _in_time(connect: Callable[[], Any], seconds: float) -> Any:
    """The socket that `connect` makes. Looking up a name knows no time-out, so it is done in a thread.

    Raises TimeoutError, and whatever `connect` raises.
    """
    lock = threading.Lock()
    done = threading.Event()
    result: list[Any] = []
    is_late = False

    def work() -> None:
        try:
            made = connect()
        except BaseException as error:  # raised below, in the thread that waits
            made = error
        with lock:
            if not is_late:
                result.append(made)
            elif not isinstance(made, BaseException):
                made.close()
        done.set()

    threading.Thread(target=work, name="kv-store-connect", daemon=True).start()
    done.wait(seconds)
    with lock:
        is_late = not result
    if is_late:
        raise TimeoutError("connecting took too long")
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]
