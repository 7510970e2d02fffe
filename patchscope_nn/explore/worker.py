"""One thread that does all model work, in the order in which it is asked: traces are not for two threads."""

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
    """Nobody waits for the answer any more."""


class Ask:
    """One request: what is to be done, and who is told how it goes.

    Args:
        task: The work; given this object, to tell of its progress.
        tell: Called with each event, from any thread.
    """

    def __init__(self, task: Callable[[Ask], None], tell: Callable[[Event], None]) -> None:
        self._task, self._tell = task, tell
        self._cancelled = threading.Event()
        self._ahead = 0

    def wait(self, ahead: int) -> None:
        """Tell how many are before this one in the line, where that has changed."""
        if ahead and ahead != self._ahead:
            self._ahead = ahead
            self._tell({"event": "waiting", "ahead": ahead})

    def tell(self, event: str, **more: Any) -> None:
        """Tell of something, or end here where nobody waits.

        Raises:
            CancelledError: The request was cancelled.
        """
        if self._cancelled.is_set():
            raise CancelledError
        self._tell({"event": event, **more})

    def cancel(self) -> None:
        """Let the work end at its next event."""
        self._cancelled.set()

    def end(self, message: str, hint: str) -> None:
        """Cancel, and say why to who waits."""
        self.cancel()
        self._tell({"event": "error", "message": message, "hint": hint})

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled.is_set()

    def run(self) -> None:
        """Do the work; its end, good or bad, is the last event."""
        try:
            self.tell("started")
            self._task(self)
            self.tell("done")
        except CancelledError:
            return
        except Exception as error:  # noqa: BLE001 (whatever it is, the page is told and the thread lives on)
            if not self.cancelled:
                self._tell(as_event(error))


def as_event(error: Exception) -> Event:
    """An error as the page shows it: the package's own with their hint, others in a line and in the log."""
    if isinstance(error, SpecError):
        message = "\n".join(map(str, error.problems))
        return {"event": "error", "message": message, "hint": error.hint}
    if isinstance(error, PatchscopeError):
        return {"event": "error", "message": error.message, "hint": error.hint}
    _log.error("a request failed", exc_info=error)
    return {
        "event": "error",
        "message": f"something failed that should not have: {type(error).__name__}: {error}",
        "hint": "The terminal that runs `patchscope explore` shows where.",
    }


class Worker:
    """The thread, and the requests that wait for it."""

    def __init__(self) -> None:
        self._waiting: deque[Ask] = deque()
        self._changed = threading.Condition()
        self._running: Ask | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="patchscope-explore", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask) -> None:
        """Put a request at the end of the line."""
        with self._changed:
            self._waiting.append(ask)
            self._tell_line()
            self._changed.notify()

    def cancel(self, ask: Ask) -> None:
        """Drop a request, whether it waits or runs; what ran is lost."""
        ask.cancel()
        with self._changed:
            if ask in self._waiting:
                self._waiting.remove(ask)
                self._tell_line()

    def stop(self, *, timeout_s: float = 5.0) -> bool:
        """Cancel everything and end the thread.

        Returns:
            Whether it ended in time.
        """
        with self._changed:
            self._stopped = True
            for ask in (*self._waiting, *([self._running] if self._running else [])):
                ask.end("the explorer was stopped.", "Start `patchscope explore` again.")
            self._waiting.clear()
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _tell_line(self) -> None:
        """Tell each that waits how many are before it."""
        busy = self._running is not None
        for ahead, ask in enumerate(self._waiting, start=int(busy)):
            ask.wait(ahead)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                self._running = ask = self._waiting.popleft()
                self._tell_line()
            ask.run()
            with self._changed:
                self._running = None
