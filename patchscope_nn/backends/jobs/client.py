"""What the scheduler needs of a server's client, and how long it waits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

from patchscope_nn.body.program import Results, Series, StepProgram
from patchscope_nn.errors import PatchscopeError, ServerError
from patchscope_nn.models import Model
from patchscope_nn.plan import Context

#: The end of every hint about a server that failed.
AGAIN = "The same command goes on with what is done, and with the jobs that are on their way."


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """The status of a job, as its server reports it.

    Attributes:
        status: `UNKNOWN`, or NDIF's `RECEIVED`, `QUEUED`, `PROVISIONING`, `DEPLOYING`, `DISPATCHED`,
            `RUNNING`, `COMPLETED`, `ERROR`.
        description: The place in the queue, or why the job failed.
        data: Where the result of a completed job is.
        cost: What the job used, as the server counts it.
    """

    status: str
    description: str = ""
    data: Any = None
    cost: dict[str, Any] | None = None

    @property
    def words(self) -> tuple[str, str]:
        """The status and its description."""
        return self.status, self.description


class JobClient(Protocol):
    """Sends jobs to a server, and follows them."""

    @property
    def host(self) -> str:
        """The server's URL."""

    def submit(self, context: Context, program: StepProgram | Series, model: Model) -> str:
        """Send a step as one job, without waiting for it, and return the job's id.

        Raises:
            InputError: The step cannot run on a server, and was not sent; or the key is refused.
            ServerError: The server cannot be reached.
        """

    def look(self, job: str) -> JobStatus:
        """Return the status of a job.

        Raises:
            ServerError: The server cannot be reached.
        """

    def fetch(self, seen: JobStatus, context: Context) -> Results:
        """Return the result of a completed job, as a backend returns it.

        Raises:
            ServerError: It cannot be fetched, or is no longer there.
            JobError: It does not have the form of a result.
        """

    def failure(self, seen: JobStatus) -> PatchscopeError:
        """Return the error for a failed job: `JobError` if it is the job's own fault, else `ServerError`."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to wait, in seconds.

    Attributes:
        poll_s: Between two status requests, at first; it grows to ten times that.
        unreachable_s: For a server that does not answer.
        unknown_s: For a job that the server does not know; it may be too new.
        stalled_s: For a queued job whose status does not change, before a liveness job is sent.
        give_up_s: For any job to change its status.
    """

    poll_s: float = 0.1
    unreachable_s: float = 90
    unknown_s: float = 60
    stalled_s: float = 60
    give_up_s: float = 1800


def persisting(patience: Patience) -> Any:
    """Return a function that calls another, again and again while the server does not answer."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

    return Retrying(
        retry=retry_if_exception_type(ServerError),
        stop=stop_after_delay(patience.unreachable_s),
        wait=wait_exponential(multiplier=0.2, max=5),
        reraise=True,
    )


def wait(client: JobClient, job: str, context: Context) -> Results:
    """Wait for a job, and fetch its result.

    Raises:
        JobError: It failed.
        ServerError: The server cannot be reached, or nothing moved for too long.
    """
    patience = Patience()
    persist = persisting(patience)
    pause, latest, moved = patience.poll_s, ("", ""), time.monotonic()
    while True:
        seen: JobStatus = persist(client.look, job)
        if seen.status == "COMPLETED":
            return client.fetch(seen, context)
        if seen.status == "ERROR":
            raise client.failure(seen)
        if seen.words != latest:
            latest, moved = seen.words, time.monotonic()
        elif time.monotonic() - moved > patience.give_up_s:
            raise nothing_moves(client.host, patience.give_up_s)
        time.sleep(pause)
        pause = min(pause * 1.3, 10 * patience.poll_s)


def nothing_moves(host: str, seconds: float) -> ServerError:
    """The error for a server that answers, but runs nothing."""
    return ServerError(
        f"{host} answers, but no job has moved for {seconds:.0f} s: its dispatcher may be down.",
        hint=f"Ask its operator. {AGAIN}",
    )


def too_long(seen: JobStatus) -> bool:
    """True if a job failed because it exceeded the time limit of its server."""
    return "execution timeout" in seen.description
