"""The client of an NDIF server: send a job, ask for its status, fetch its result.

Requests go through nnsight's own client. A request names one model. Everything that is sent with it is
checked first (`portability.py`). Every failure becomes an error that says what to do next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from patchscope_nn.backends.ndif.portability import check_travels
from patchscope_nn.body.program import Results, Series, StepProgram
from patchscope_nn.engines import engine_of
from patchscope_nn.errors import InputError, JobError, ModelError, ServerError
from patchscope_nn.models import Model
from patchscope_nn.plan import Context

_TIMEOUT_S = 60.0
_REFUSED = (400, 401, 403)


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


def host_of(remote: bool | str) -> str:  # noqa: FBT001 (the value of an option, as users give it)
    """The URL that the option `remote` names; True stands for the server that nnsight is configured for.

    Raises:
        InputError: It is not a URL.
    """
    from nnsight import CONFIG

    host = str(CONFIG.API.HOST if remote is True else remote).rstrip("/")
    if not host.startswith(("http://", "https://")):
        raise InputError(
            f"remote={remote!r} is not a server.",
            hint="Give True for the configured NDIF, a URL (https://...), or 'local' to rehearse.",
        )
    return host


def submit(host: str, context: Context, program: StepProgram | Series, model: Model) -> str:
    """Send a step as one job, without waiting for it, and return the job's id.

    The context is `session` or `fused`, which run the one model that the request names.

    Raises:
        InputError: The step cannot run on a server, and was not sent; or the key is refused.
        ServerError: The server cannot be reached.
    """
    from nnsight.intervention.backends.remote import RemoteBackend

    if context not in ("session", "fused"):
        raise InputError(f"a request names one model; context={context!r} runs two.", hint="Use bridged.")
    steps: Any = program.get("series", [program])
    for step in steps:
        check_travels(step["writing"]["weights"])
        for body in {target["readout"]["read"] for target in step["targets"]}:
            check_travels(body, what="readout's body")
    with explained(host):
        env = model.traced._remoteable_get_env()  # noqa: SLF001 (what nnsight's own remote=True sends)
        backend = RemoteBackend(_key(model), host=host, env=env, blocking=False)
        backend.display.enabled = False
        engine_of(model).run(context, program, source=model, target=model, backend=backend)
    return str(backend.job_id)


def look(host: str, job: str) -> JobStatus:
    """Ask for the status of a job."""
    import httpx
    from nnsight.schema.response import ResponseModel

    with explained(host):
        answer = httpx.get(f"{host}/response/{job}", headers=headers(), timeout=_TIMEOUT_S)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return JobStatus(status="UNKNOWN")
        answer.raise_for_status()
        found = ResponseModel.model_validate_json(answer.text)
    return JobStatus(
        status=found.status.value, description=found.description, data=found.data, cost=found.meta
    )


def fetch(host: str, seen: JobStatus, context: Context) -> Results:
    """The result of a completed job, as a backend returns it.

    Raises:
        ServerError: It cannot be fetched, or is no longer there.
        JobError: It does not have the form of a result.
    """
    from nnsight.intervention.backends.remote import RemoteBackend

    with explained(host, result=True):
        backend = RemoteBackend("", host=host)
        backend.display.enabled = False
        saved = backend.download_result(seen.data)
    name = "columns" if context == "fused" else "results"
    if not isinstance(saved, dict) or name not in saved:
        given = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
        raise JobError(
            f"{host} gave a result of an unexpected shape: {given} in place of {name!r}.",
            hint="Compare the versions of nnsight here and there: patchscope doctor --remote.",
        )
    results = saved[name]
    if context == "fused":
        return {"passes": [results], "kept": None, "kept_finals": None, "prefix": None}
    return results


def _key(model: Model) -> str:
    """The key by which a server knows a model; the Hub is asked for the exact spelling of its id."""
    # HTTPError is imported from here because huggingface_hub 1 uses httpx, and huggingface_hub 2 uses httpx2.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
    )

    try:
        return str(model.traced.to_model_key())
    except OfflineModeIsEnabled:
        raise ModelError(
            f"a server knows {model.info.name!r} by its id on the Hub, and HF_HUB_OFFLINE forbids to ask it.",
            hint="Unset HF_HUB_OFFLINE, or let HF_ENDPOINT name the hub that your server uses.",
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"{model.info.name!r} is no id on the Hub, by which a server could know it: "
            f"{str(error).strip().splitlines()[0]}",
            hint="Give the model's id, such as 'meta-llama/Llama-3.1-8B'; a folder is known only here.",
        ) from None
    except HTTPError as error:
        raise ServerError(
            f"the Hub cannot be asked for the id of {model.info.name!r} ({type(error).__name__}: {error}).",
            hint=f"Check the network, and the address in HF_ENDPOINT if it is set. {_AGAIN}",
        ) from error


def headers() -> dict[str, str]:
    """The API key, if nnsight has one."""
    from nnsight import CONFIG

    return {"ndif-api-key": CONFIG.API.APIKEY} if CONFIG.API.APIKEY else {}


@contextmanager
def explained(host: str, *, result: bool = False) -> Iterator[None]:
    """Turn the exceptions of a request into one error each; the server's own words are kept."""
    import httpx
    from nnsight.intervention.backends.remote import RemoteError

    try:
        yield
    except httpx.HTTPStatusError as error:
        answer = error.response
        raise _refused(host, answer.status_code, answer.reason_phrase, result=result) from error
    except RemoteError as error:
        cause = error.__cause__
        if isinstance(cause, httpx.HTTPStatusError):
            raise _refused(host, cause.response.status_code, str(error), result=result) from error
        raise _unreachable(host, cause or error) from error
    except (httpx.HTTPError, ConnectionError) as error:
        raise _unreachable(host, error) from error
    except ValidationError as error:  # a server that is stopping sends half an answer
        raise ServerError(f"{host} gave half an answer.", hint=_AGAIN) from error


_AGAIN = "The same command goes on with what is done, and with the jobs that are on their way."


def _unreachable(host: str, error: BaseException) -> ServerError:
    return ServerError(
        f"{host} cannot be reached ({type(error).__name__}: {error}).",
        hint=f"Is it up, and is the address right (NDIF_HOST, --remote)? {_AGAIN}",
    )


def _refused(host: str, code: int, said: str, *, result: bool) -> InputError | ServerError:
    if result:
        return ServerError(f"{host} has the result no longer ({code}).", hint="Its job is sent again.")
    if code in _REFUSED:
        return InputError(
            f"{host} refuses the request ({code}): {said}",
            hint="Set NDIF_API_KEY to a valid key; `patchscope doctor --remote` tests it.",
        )
    return ServerError(f"{host} answers {code}: {said}", hint=_AGAIN)


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


def wait(host: str, job: str, context: Context) -> Results:
    """Wait for a job, and fetch its result.

    Raises:
        JobError: It failed.
        ServerError: The server cannot be reached, or nothing moved for too long.
    """
    patience = Patience()
    persist = persisting(patience)
    pause, latest, moved = patience.poll_s, ("", ""), time.monotonic()
    while True:
        seen: JobStatus = persist(look, host, job)
        if seen.status == "COMPLETED":
            return fetch(host, seen, context)
        if seen.status == "ERROR":
            raise failure(host, seen)
        if seen.words != latest:
            latest, moved = seen.words, time.monotonic()
        elif time.monotonic() - moved > patience.give_up_s:
            raise nothing_moves(host, patience.give_up_s)
        time.sleep(pause)
        pause = min(pause * 1.3, 10 * patience.poll_s)


def nothing_moves(host: str, seconds: float) -> ServerError:
    """The error for a server that answers, but runs nothing."""
    return ServerError(
        f"{host} answers, but no job has moved for {seconds:.0f} s: its dispatcher may be down.",
        hint=f"Ask its operator. {_AGAIN}",
    )


#: Texts in the description of a job that failed through no fault of its own, and can be sent again.
_PASSING = ("try again later", "evicted", "cancelled", "preempted", "payload could not be read", "restart")


def too_long(seen: JobStatus) -> bool:
    """True if a job failed because it exceeded the time limit of its server."""
    return "execution timeout" in seen.description


def failure(host: str, seen: JobStatus) -> JobError | ServerError | ModelError:
    """The error for a failed job: the job's own fault, the server's, or a model that it cannot run."""
    said = seen.description.strip()
    if "Could not deploy this model" in said:
        return ModelError(
            f"{host} cannot run this model: {said.splitlines()[0]}.",
            hint="`patchscope doctor --remote` lists the models that run there.",
        )
    if any(text in said for text in _PASSING) and "Traceback" not in said:
        return ServerError(f"{host}: {said}", hint=_AGAIN)
    if too_long(seen):
        return JobError(f"{host}: {said}", hint="Smaller jobs: --max-rows, or a server with more time.")
    last = said.splitlines()[-1] if said else "no reason given"
    return JobError(
        f"the job failed on {host}: {last}",
        hint="If it runs here without --remote, compare the versions: patchscope doctor --remote.",
    )
