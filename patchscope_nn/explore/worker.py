"""The thread that does all model work, one request after another: nnsight traces are not thread-safe."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from patchscope_nn.errors import PatchscopeError, SpecError

Event = dict[str, Any]
_log = logging.getLogger(__name__)


class CancelledError(Exception):
    """The request was cancelled, so that nobody waits for its answer."""


class Query:
    """A request of the page: work, which reports progress here, and a receiver of its events."""

    def __init__(self, task: Callable[[Query], None], send: Callable[[Event], None]) -> None:
        self._task, self._send = task, send
        self.cancelled = False
        self._ahead = 0

    def wait(self, ahead: int) -> None:
        """Report the number of requests before this one, if it has changed."""
        if ahead and ahead != self._ahead:
            self._ahead = ahead
            self._send({"event": "waiting", "ahead": ahead})

    def report(self, event: str, **more: Any) -> None:
        """Send an event to the page; CancelledError ends the work if the request was cancelled."""
        if self.cancelled:
            raise CancelledError
        self._send({"event": event, **more})

    def cancel(self) -> None:
        """Make the work end at its next event."""
        self.cancelled = True

    def end(self, message: str, hint: str) -> None:
        """Cancel the request and report an error."""
        self.cancel()
        self._send({"event": "error", "message": message, "hint": hint})

    def run(self) -> None:
        """Do the work; the last event is `done` or `error`."""
        try:
            self.report("started")
            self._task(self)
            self.report("done")
        except CancelledError:
            return
        except Exception as error:  # noqa: BLE001 (the page reports any error, and the thread lives on)
            if not self.cancelled:
                self._send(as_event(error))


def as_event(error: Exception) -> Event:
    """Convert an error to an event: the package's own with its hint, any other with its type, and logged."""
    if isinstance(error, SpecError):
        message, hint = "\n".join(map(str, error.problems)), error.hint
    elif isinstance(error, PatchscopeError):
        message, hint = error.message, error.hint
    else:
        _log.error("a request failed", exc_info=error)
        message = f"unexpected error: {type(error).__name__}: {error}"
        hint = "The terminal of `patchscope explore` shows the traceback."
    return {"event": "error", "message": message, "hint": hint}


class Worker:
    """The thread and its queue of requests."""

    def __init__(self) -> None:
        self._waiting: deque[Query] = deque()
        self._changed = threading.Condition()
        self._running: Query | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="patchscope-explore", daemon=True)
        self._thread.start()

    def submit(self, query: Query) -> None:
        """Put a request at the end of the queue."""
        with self._changed:
            self._waiting.append(query)
            self._report_queue()
            self._changed.notify()

    def cancel(self, query: Query) -> None:
        """Cancel a request that waits or runs; its partial results are lost."""
        query.cancel()
        with self._changed:
            if query in self._waiting:
                self._waiting.remove(query)
                self._report_queue()

    def stop(self, *, timeout_s: float = 5.0) -> bool:
        """Cancel all requests and end the thread; return whether it ended in time."""
        with self._changed:
            self._stopped = True
            for query in (*self._waiting, *([self._running] if self._running else [])):
                query.end("the explorer was stopped.", "Start `patchscope explore` again.")
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _report_queue(self) -> None:
        """Report to each waiting request how many are before it."""
        busy = self._running is not None
        for ahead, query in enumerate(self._waiting, start=int(busy)):
            query.wait(ahead)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                self._running = query = self._waiting.popleft()
                self._report_queue()
            query.run()
            with self._changed:
                self._running = None
