"""The client of a vLLM engine that `patchscope serve` serves.

A job is a step. Its prompts are requests of their own, which are sent side by side, so that the engine
batches them. Their answers come back on the same connections, so a job lives as long as the process that sent
it: after a restart it is lost, and its cells are sent again.
"""

from __future__ import annotations

import functools
import io
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from patchscope_nn._util.versions import same_version, versions_of
from patchscope_nn.backends.jobs.client import AGAIN, JobStatus
from patchscope_nn.body.contexts import open_requests
from patchscope_nn.body.program import Results, Series, StepProgram
from patchscope_nn.body.requests import RequestProgram
from patchscope_nn.errors import InputError, JobError, ModelError, PatchscopeError, ServerError
from patchscope_nn.lower.requests import Exchange, exchange
from patchscope_nn.models import Model, in_turn
from patchscope_nn.plan import Context

#: The schemes of its URLs.
SCHEMES = ("vllm+http://", "vllm+https://")
#: The environment variable with the key, for the server and for its clients.
KEY = "PATCHSCOPE_API_KEY"
#: The path that describes a server.
ABOUT = "/patchscope"
#: How many requests are open at a time: as many as vLLM batches by default.
_OPEN = 256
_CONNECT_S, _ANSWER_S = 10.0, 1800.0
_START = "Start it with `patchscope serve MODEL`."


@dataclass(frozen=True, kw_only=True)
class About:
    """What a server says of itself.

    Attributes:
        model: The model, by the name with which it was started.
        dtype: The dtype of its weights.
        max_model_len: The length of the longest prompt with its text, in tokens.
        held_tokens: The number of tokens whose keys and values it can hold.
        held_block: The number of tokens in a block of them.
        preemptions: How often the engine has put a request off, and computed it again.
        versions: The versions of the packages that decide results.
    """

    model: str
    dtype: str
    max_model_len: int
    held_tokens: int | None
    held_block: int
    preemptions: int
    versions: dict[str, str]


@dataclass
class _Job:
    """A step whose requests are on their way.

    Attributes:
        model: The model.
        steps: The exchange of requests and answers.
        preemptions: The server's count when the job began.
        answers: The answers that are awaited.
        results: The results, once it is done.
    """

    model: Model
    steps: Exchange
    preemptions: int
    answers: list[Future[Any]]
    results: Results | None = None


class ServedClient:
    """Sends jobs to a server. Implements `JobClient`.

    Attributes:
        host: The server's URL, with the scheme `vllm+http` or `vllm+https`.
    """

    def __init__(self, host: str) -> None:
        import httpx

        self.host = host
        self._url = host.removeprefix("vllm+")
        self._jobs: dict[str, _Job] = {}
        self._pool = ThreadPoolExecutor(_OPEN, thread_name_prefix="served")
        limits = httpx.Limits(max_connections=_OPEN)
        timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
        self._http = httpx.Client(timeout=timeout, limits=limits)

    def about(self) -> About:
        """Ask the server what it runs.

        Raises:
            InputError: The key is refused, or no `patchscope serve` answers.
            ServerError: It cannot be reached, or its engine is dead.
        """
        with self._explained():
            answer = self._http.get(f"{self._url}{ABOUT}", headers=_headers(), timeout=_CONNECT_S)
            self._check(answer)
            return About(**answer.json())

    def check_model(self, name: str) -> About:
        """Check that the server runs a model, with versions that fit to those here.

        Raises:
            ModelError: It runs another model, or its versions do not fit.
        """
        about = self.about()
        if about.model != name:
            raise ModelError(
                f"{self.host} runs {about.model!r}, and not {name!r}.",
                hint=f"Give --model {about.model}, or start a server of the other model.",
            )
        ours = versions_of((*about.versions,))
        for package, theirs in about.versions.items():
            if not same_version(ours[package], theirs):
                raise ModelError(
                    f"{self.host} has {package} {theirs}, and this process has {ours[package]}. Traces are "
                    "built here and run there, so both need the same.",
                    hint=f"pip install '{package}=={theirs}'",
                )
        return about

    def submit(self, _context: Context, program: StepProgram | Series, model: Model) -> str:
        """Send the first requests of a step, and return the id of its job; see `JobClient.submit`."""
        step: Any = program
        job = _Job(model, exchange(step), self.about().preemptions, [])
        self._advance(job, None)
        number = uuid.uuid4().hex
        self._jobs[number] = job
        return number

    def look(self, job: str) -> JobStatus:
        """Return the status of a job, and send its next requests once the last ones are answered."""
        running = self._jobs.get(job)
        if running is None:
            gone = ServerError("the process that sent this job has ended.", hint=AGAIN)
            return JobStatus(status="ERROR", description=gone.message, data=gone)
        waiting = sum(not answer.done() for answer in running.answers)
        if waiting:
            return JobStatus(status="RUNNING", description=f"{waiting} requests are open")
        try:
            if running.results is None:
                self._advance(running, [answer.result() for answer in running.answers])
            if running.results is None:
                return JobStatus(status="RUNNING", description=f"{len(running.answers)} requests are open")
        except PatchscopeError as error:
            del self._jobs[job]
            return JobStatus(status="ERROR", description=error.message, data=error)
        del self._jobs[job]
        return JobStatus(status="COMPLETED", data=running.results)

    def fetch(self, seen: JobStatus, _context: Context) -> Results:
        """Return the result of a completed job."""
        results: Results = seen.data
        return results

    def failure(self, seen: JobStatus) -> PatchscopeError:
        """Return the error for a failed job."""
        error: PatchscopeError = seen.data
        return error

    def _advance(self, job: _Job, answers: list[Any] | None) -> None:
        """Continue a job with the answers to its requests, until it has sent others or is done.

        Raises:
            JobError: The engine has computed prompts again, without their patches.
        """
        try:
            requests = next(job.steps) if answers is None else job.steps.send(answers)
        except StopIteration as ended:
            if self.about().preemptions != job.preemptions:
                raise JobError(
                    f"{self.host} was out of memory for keys and values, and computed prompts again without "
                    "their patches.",
                    hint="Smaller jobs: --max-rows.",
                ) from None
            job.results, job.answers = ended.value, []
            return
        job.answers = [self._pool.submit(self._ask, blob) for blob in _serialised(job.model, requests)]

    def _ask(self, blob: bytes) -> Any:
        """Send one request, and return its answer.

        Raises:
            ServerError: The server or its engine does not answer.
            JobError: The request failed.
        """
        with self._explained():
            answer = self._http.post(f"{self._url}/v1/nnsight/generate", content=blob, headers=_headers())
            self._check(answer)
        result = torch.load(io.BytesIO(answer.content), map_location="cpu", weights_only=False)
        _raise(self.host, result.get("error"))
        return result["saves"]["answers"]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.HTTPError as error:
            raise ServerError(
                f"{self.host} cannot be reached ({type(error).__name__}: {error}).", hint=f"{_START} {AGAIN}"
            ) from error

    def _check(self, answer: Any) -> None:
        """Check the status of an HTTP answer."""
        if answer.status_code == 200:  # noqa: PLR2004 (OK)
            return
        try:
            reason = str(answer.json().get("detail", answer.reason_phrase))
        except ValueError:
            reason = answer.reason_phrase
        if answer.status_code == 401:  # noqa: PLR2004 (unauthorised)
            raise InputError(
                f"{self.host} refuses the key: {reason}", hint=f"export {KEY}=... with the server's key."
            )
        if answer.status_code == 404:  # noqa: PLR2004 (not found)
            raise InputError(f"{self.host} is no server of `patchscope serve`.", hint=_START)
        raise ServerError(f"{self.host} answers {answer.status_code}: {reason}", hint=f"{_START} {AGAIN}")


@functools.lru_cache(maxsize=8)
def served_client(host: str) -> ServedClient:
    """Return the client of a server; one for each URL, because it holds the jobs that are on their way."""
    return ServedClient(host)


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY)
    return {"nnsight-compress": "False", **({"ndif-api-key": key} if key else {})}


@in_turn
def _serialised(model: Model, requests: list[RequestProgram]) -> list[bytes]:
    """Return each request as a trace in nnsight's form for servers."""
    import nnsight
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.backend import Backend

    nnsight.register("patchscope_nn")
    blobs: list[bytes] = []

    class Keeping(Backend):
        def __call__(self, tracer: Any) -> None:
            blobs.append(RequestModel.serialize(tracer, compress=False))

    with torch.no_grad():
        for request in requests:
            open_requests(model.traced, [request], backend=Keeping())
    return blobs


def _raise(host: str, deferred: Any) -> None:
    """Raise the error of a request, if it has one, as one of ours."""
    from nnsight.intervention.errors import raise_deferred

    try:
        raise_deferred(deferred)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[-1]}"
        if "EngineDead" in reason or "EngineCore" in reason:
            raise ServerError(
                f"{host}: its engine is dead ({reason}).", hint=f"Start the server again. {AGAIN}"
            ) from error
        raise JobError(
            f"a request failed on {host}: {reason}",
            hint="If it runs without --remote, compare the versions: patchscope doctor --remote.",
        ) from error
