"""The host's work beside the model's: while a step runs, a second thread writes the cells of the step before.

The step itself stays in the calling thread, since nnsight keeps the state of a trace on the model. The same
thread prepares the next step (`backends.run_steps`). There is only one, so cells are written in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager

from patchscope_nn.analysis.tabulate import Tabulator
from patchscope_nn.backends import PassResult
from patchscope_nn.backends.jobs.scheduler import Failed
from patchscope_nn.runs.folder import InMemory


@contextmanager
def second_thread(*, wanted: bool) -> Iterator[Executor | None]:
    """Return a thread for the host's work; at the end, wait for what it has begun."""
    if not wanted:
        yield None
        return
    with ThreadPoolExecutor(1, thread_name_prefix="patchscope") as thread:
        yield thread


class Writer:
    """Tabulates and stores the results of steps.

    Args:
        store: Where finished cells are kept.
        tabulate: Makes the rows of the table.
        packed: True if cells that are not finite may have been spoiled by others, and must run again.

    Attributes:
        n_again: How many cells must run again.
    """

    def __init__(self, store: InMemory, tabulate: Tabulator, *, packed: bool) -> None:
        self._store, self._tabulate, self._packed, self.n_again = store, tabulate, packed, 0

    def write(self, step: Iterable[PassResult | Failed]) -> None:
        """Store the finished cells of a step."""
        results: list[PassResult] = []
        failed: dict[int, str] = {}
        for result in step:
            if isinstance(result, Failed):
                failed |= dict.fromkeys(result.cells.tolist(), result.reason)
            elif self._packed and not result.finite.all():
                self.n_again += int((~result.finite).sum())
                results.append(result.take(result.finite))
            else:
                results.append(result)
        self._store.append(self._tabulate.table(results, failed))


def behind(calls: Iterator[Callable[[], None]], thread: Executor | None) -> Iterator[None]:
    """Make each call in a thread while the next one is computed here; yields when a call has returned.

    An error of a call is raised here, as soon as the next call has been computed. However this ends, the call
    that was begun is completed first, so that nothing is lost that a step has returned.
    """
    begun: Future[None] | None = None
    try:
        for call in calls:
            if thread is None:
                call()
                yield
                continue
            earlier, begun = begun, thread.submit(call)
            if earlier is not None:
                earlier.result()
                yield
    finally:
        if begun is not None:
            begun.result()
    if begun is not None:
        yield
