"""NDIF: one request out, its state, and its result; every fault as an error that says what to do next.

NDIF is asked through nnsight's own client. A request names one model, and what it takes with it has been
looked through (`travel.py`) before it is sent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from patchscope_nn.backends.ndif.portability import check_travels
from patchscope_nn.body.program import Work
from patchscope_nn.engines import Results, emit
from patchscope_nn.errors import InputError, JobError, ModelError, ServerError
from patchscope_nn.models import Model
from patchscope_nn.plan import Context

_TIMEOUT_S = 60.0
_REFUSED = (400, 401, 403)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a server says of a job.

    Attributes:
        status: `UNKNOWN`, or NDIF's `RECEIVED`, `QUEUED`, `PROVISIONING`, `DEPLOYING`, `DISPATCHED`,
            `RUNNING`, `COMPLETED`, `ERROR`.
        said: Its description: a place in the queue, or why it failed.
        data: Where the result is, of a job that is completed.
        cost: What it took, as the server counts.
    """

    status: str
    said: str = ""
    data: Any = None
    cost: dict[str, Any] | None = None


def host_of(remote: bool | str) -> str:  # noqa: FBT001 (the value of an option, as users give it)
    """The URL that an option names; True is the one nnsight is configured for.

    Raises:
        InputError: It is no URL.
    """
    from nnsight import CONFIG

    host = str(CONFIG.API.HOST if remote is True else remote).rstrip("/")
    if not host.startswith(("http://", "https://")):
        raise InputError(
            f"remote={remote!r} is no server.",
            hint="Give True for the configured NDIF, a URL (https://...), or 'local' to rehearse.",
        )
    return host


def submit(host: str, context: Context, work: Work, model: Model) -> str:
    """Send a context as one job, and do not wait for it.

    Args:
        host: The server.
        context: `session` or `fused`.
        work: What `unpack` made of it.
        model: The one model that the request names.

    Returns:
        The job's id.

    Raises:
        InputError: The request would not run there, and has not been sent; or the key is refused.
        ServerError: The server cannot be reached.
    """
    from nnsight.intervention.backends.remote import RemoteBackend

    if context not in ("session", "fused"):
        raise InputError(f"a request names one model; context={context!r} runs two.", hint="Use bridged.")
    check_travels(work["how"]["mapping"][1])
    for body in {target["readout"]["read"] for target in work.get("targets", ())}:
        check_travels(body, what="readout's body")
    with explained(host):
        env = model.traced._remoteable_get_env()  # noqa: SLF001 (what nnsight's own remote=True sends)
        backend = RemoteBackend(_key(model), host=host, env=env, blocking=False)
        backend.display.enabled = False
        emit(context, work, source=model.traced, target=model.traced, backend=backend)
    return str(backend.job_id)


def look(host: str, job: str) -> Seen:
    """Ask what became of a job.

    Raises:
        ServerError: The server cannot be reached.
    """
    import httpx
    from nnsight.schema.response import ResponseModel

    with explained(host):
        answer = httpx.get(f"{host}/response/{job}", headers=headers(), timeout=_TIMEOUT_S)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return Seen(status="UNKNOWN")
        answer.raise_for_status()
        found = ResponseModel.model_validate_json(answer.text)
    return Seen(status=found.status.value, said=found.description, data=found.data, cost=found.meta)


def fetch(host: str, seen: Seen, context: Context) -> Results:
    """The result of a job that is completed, as `emit` gives it.

    Raises:
        ServerError: It cannot be fetched, or no longer.
        JobError: It is no result of ours.
    """
    from nnsight.intervention.backends.remote import RemoteBackend

    with explained(host, result=True):
        backend = RemoteBackend("", host=host)
        backend.display.enabled = False
        saved = backend.download_result(seen.data)
    name = "rows" if context == "fused" else "results"
    if not isinstance(saved, dict) or name not in saved:
        given = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
        raise JobError(
            f"{host} gave a result of an unexpected shape: {given} in place of {name!r}.",
            hint="Compare the versions of nnsight here and there: patchscope doctor --remote.",
        )
    results = saved[name]
    return {"passes": [results], "kept": {}, "prefix": None} if context == "fused" else results


def _key(model: Model) -> str:
    """What a server knows a model by; the Hub is asked how its id is spelled."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

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


def headers() -> dict[str, str]:
    """The key, where nnsight is given one."""
    from nnsight import CONFIG

    return {"ndif-api-key": CONFIG.API.APIKEY} if CONFIG.API.APIKEY else {}


@contextmanager
def explained(host: str, *, result: bool = False) -> Iterator[None]:
    """Turn what a request raises into one message; a server's own words are kept."""
    import httpx
    from nnsight.intervention.backends.remote import RemoteError

    try:
        yield
    except httpx.HTTPStatusError as error:
        raise _refused(
            host, error.response.status_code, error.response.reason_phrase, result=result
        ) from error
    except RemoteError as error:
        cause = error.__cause__
        if isinstance(cause, httpx.HTTPStatusError):
            raise _refused(host, cause.response.status_code, str(error), result=result) from error
        raise _unreachable(host, cause or error) from error
    except (httpx.HTTPError, ConnectionError, ValueError) as error:
        if not isinstance(error, httpx.HTTPError | ConnectionError):
            # pydantic's: a server that is stopping sends half an answer.
            if type(error).__name__ != "ValidationError":
                raise
            raise ServerError(f"{host} gave half an answer.", hint=_AGAIN) from error
        raise _unreachable(host, error) from error


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
    """How long to wait for what, in seconds.

    Attributes:
        poll_s: Between two looks, at first; it grows to ten times that.
        unreachable_s: For a server that does not answer.
        unknown_s: For a job that its server does not know, which may be because it is new.
        stalled_s: For a job in the queue that does not move, before it is asked after.
        give_up_s: For anything to move at all.
    """

    poll_s: float = 0.1
    unreachable_s: float = 90
    unknown_s: float = 60
    stalled_s: float = 60
    give_up_s: float = 1800


def look_again(host: str, job: str, patience: Patience) -> Seen:
    """Ask what became of a job, and ask again while the server does not answer.

    Raises:
        ServerError: It did not answer for too long.
    """
    return _persisting(patience)(look, host, job)


def submit_again(host: str, context: Context, work: Work, model: Model, patience: Patience) -> str:
    """Send a job, and send it again while the server does not answer.

    Raises:
        ServerError: It did not answer for too long.
    """
    return _persisting(patience)(submit, host, context, work, model)


def _persisting(patience: Patience) -> Any:
    from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

    return Retrying(
        retry=retry_if_exception_type(ServerError),
        stop=stop_after_delay(patience.unreachable_s),
        wait=wait_exponential(multiplier=0.2, max=5),
        reraise=True,
    )


def wait(host: str, job: str, context: Context, *, patience: Patience | None = None) -> Results:
    """Wait for a job, and fetch its result.

    Raises:
        JobError: It failed.
        ServerError: The server cannot be reached, or nothing moved for too long.
    """
    patience = patience or Patience()
    pause, latest, moved = patience.poll_s, None, time.monotonic()
    while True:
        seen = look_again(host, job, patience)
        if seen.status == "COMPLETED":
            return fetch(host, seen, context)
        if seen.status == "ERROR":
            raise failure(host, seen)
        if (seen.status, seen.said) != latest:
            latest, moved = (seen.status, seen.said), time.monotonic()
        elif time.monotonic() - moved > patience.give_up_s:
            raise nothing_moves(host, patience.give_up_s)
        time.sleep(pause)
        pause = min(pause * 1.3, 10 * patience.poll_s)


def nothing_moves(host: str, seconds: float) -> ServerError:
    """What to say of a server that answers, and does nothing."""
    return ServerError(
        f"{host} answers, but no job has moved for {seconds:.0f} s: its dispatcher may be down.",
        hint=f"Ask its operator. {_AGAIN}",
    )


#: What a server says of a job that it did not run to its end, and would run another time.
_PASSING = ("try again later", "evicted", "cancelled", "preempted", "payload could not be read", "restart")
_DEPLOYING = ("Could not deploy this model",)
_TOO_LONG = ("execution timeout",)


def too_long(seen: Seen) -> bool:
    """Whether a job failed because it took longer than its server allows."""
    return any(text in seen.said for text in _TOO_LONG)


def failure(host: str, seen: Seen) -> JobError | ServerError | ModelError:
    """The error of a job that failed: its own fault, the server's, or that of who asked for the model."""
    said = seen.said.strip()
    if any(text in said for text in _DEPLOYING):
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
