"""The engine for asyncio: a thread runs the steps, coroutines read tokens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import TracebackType

from ..errors import BackendError
from ..sched.request import Progress, Request
from .engine import Engine
from .handle import RequestHandle


class AsyncEngine:
    """Runs an engine's steps in a thread of its own from `start` to `aclose`, or inside `async with`.

    `submit` may be called from any event loop. The engine stays open to others: threads that wait on a RequestHandle
    take turns with this one.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()  # of the two below
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()  # tells that thread to end

    def start(self) -> None:
        """Start the thread, or another one after it was closed or failed; twice does nothing."""
        with self._lock:
            if self._thread is None:
                self._stop = threading.Event()
                self._thread = threading.Thread(target=self._run, args=(self._stop,), name="gllm-engine", daemon=True)
                self._thread.start()

    def submit(self, request: Request) -> AsyncHandle:
        """Queue a request; call it inside a running event loop. Raises RequestError, CapacityError."""
        self.start()
        return AsyncHandle(self.engine.submit(request), asyncio.get_running_loop())

    async def aclose(self) -> None:
        """Stop the thread after the step that is running. Requests that have not ended stay as they are."""
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """`aclose` outside an event loop."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._stop.set()
        if thread is not None:
            self.engine.work.set()
            thread.join()

    def _run(self, stop: threading.Event) -> None:
        engine = self.engine
        try:
            while True:
                engine.work.clear()
                if stop.is_set():
                    return
                if not engine.step():
                    engine.work.wait()
        except BaseException as error:
            with self._lock:
                if self._stop is stop:  # the next request gets another thread
                    self._thread = None
            engine.fail_all(BackendError(f"the engine's thread failed with {type(error).__name__}: {error}"))
            raise

    async def __aenter__(self) -> AsyncEngine:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncHandle:
    """Asynchronous iterator over the token ids of a request; otherwise a `RequestHandle`.

    A task that is cancelled while it waits here cancels the request. A reader that leaves early calls `cancel`, or
    reads inside `async with`.
    """

    def __init__(self, handle: RequestHandle, loop: asyncio.AbstractEventLoop) -> None:
        self._handle = handle
        self._loop = loop
        self._news = asyncio.Event()
        self._is_poked = False
        handle.listen(self._poke)

    def _poke(self) -> None:
        """From the stepping thread: there is something to read."""
        if self._is_poked:
            return
        self._is_poked = True
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:  # the loop is closed: nobody can read this any more
            self._handle.cancel()

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        while not self._handle.ready:
            self._news.clear()
            self._is_poked = False
            if self._handle.ready:  # came between the two looks
                break
            try:
                await self._news.wait()
            except asyncio.CancelledError:
                self._handle.cancel()
                raise
        try:
            return next(self._handle)  # never waits: it is ready
        except StopIteration:
            raise StopAsyncIteration from None

    async def result(self) -> list[int]:
        """All token ids of the output, once the request has ended. Raises what ended it, if that was an error."""
        async for _ in self:
            pass
        return self._handle.result()

    def cancel(self) -> None:
        """End the request; tokens it has stay readable."""
        self._handle.cancel()

    async def __aenter__(self) -> AsyncHandle:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    @property
    def done(self) -> bool:
        """It has ended; tokens may still be unread."""
        return self._handle.done

    @property
    def finish_reason(self) -> str | None:
        """As RequestHandle.finish_reason."""
        return self._handle.finish_reason

    @property
    def num_read(self) -> int:
        """How many tokens have been read from this iterator."""
        return self._handle.num_read

    @property
    def tokens(self) -> list[int]:
        """Token ids so far, read or not."""
        return self._handle.tokens

    @property
    def progress(self) -> Progress:
        """What has been measured so far."""
        return self._handle.progress
