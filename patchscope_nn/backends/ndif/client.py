"""The client of an NDIF server: send a job, ask for its status, fetch its result.

Requests go through nnsight's own client. A request names one model. Everything that is sent with it is
checked first (`portability.py`). Every failure becomes an error that says what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from patchscope_nn.backends.jobs.client import AGAIN, JobStatus, too_long
from patchscope_nn.backends.ndif.portability import check_travels
from patchscope_nn.body.program import Results, Series, StepProgram
from patchscope_nn.engines import engine_of
from patchscope_nn.errors import InputError, JobError, ModelError, ServerError
from patchscope_nn.models import Model
from patchscope_nn.plan import Context

_TIMEOUT_S = 60.0
_REFUSED = (400, 401, 403)


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
            hint=f"Check the network, and the address in HF_ENDPOINT if it is set. {AGAIN}",
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
        raise ServerError(f"{host} gave half an answer.", hint=AGAIN) from error


def _unreachable(host: str, error: BaseException) -> ServerError:
    return ServerError(
        f"{host} cannot be reached ({type(error).__name__}: {error}).",
        hint=f"Is it up, and is the address right (NDIF_HOST, --remote)? {AGAIN}",
    )


def _refused(host: str, code: int, said: str, *, result: bool) -> InputError | ServerError:
    if result:
        return ServerError(f"{host} has the result no longer ({code}).", hint="Its job is sent again.")
    if code in _REFUSED:
        return InputError(
            f"{host} refuses the request ({code}): {said}",
            hint="Set NDIF_API_KEY to a valid key; `patchscope doctor --remote` tests it.",
        )
    return ServerError(f"{host} answers {code}: {said}", hint=AGAIN)


#: Texts in the description of a job that failed through no fault of its own, and can be sent again.
_PASSING = ("try again later", "evicted", "cancelled", "preempted", "payload could not be read", "restart")


@dataclass(frozen=True)
class NdifClient:
    """The client of an NDIF server, given by its URL. Implements `JobClient`."""

    host: str

    def submit(self, context: Context, program: StepProgram | Series, model: Model) -> str:
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
        with explained(self.host):
            env = model.traced._remoteable_get_env()  # noqa: SLF001 (what nnsight's own remote=True sends)
            backend = RemoteBackend(_key(model), host=self.host, env=env, blocking=False)
            backend.display.enabled = False
            engine_of(model).run(context, program, source=model, target=model, backend=backend)
        return str(backend.job_id)

    def look(self, job: str) -> JobStatus:
        """Ask for the status of a job."""
        import httpx
        from nnsight.schema.response import ResponseModel

        with explained(self.host):
            answer = httpx.get(f"{self.host}/response/{job}", headers=headers(), timeout=_TIMEOUT_S)
            if answer.status_code == httpx.codes.NOT_FOUND:
                return JobStatus(status="UNKNOWN")
            answer.raise_for_status()
            job_now = ResponseModel.model_validate_json(answer.text)
        return JobStatus(
            status=job_now.status.value,
            description=job_now.description,
            data=job_now.data,
            cost=job_now.meta,
        )

    def fetch(self, seen: JobStatus, context: Context) -> Results:
        """The result of a completed job, as a backend returns it.

        Raises:
            ServerError: It cannot be fetched, or is no longer there.
            JobError: It does not have the form of a result.
        """
        from nnsight.intervention.backends.remote import RemoteBackend

        with explained(self.host, result=True):
            backend = RemoteBackend("", host=self.host)
            backend.display.enabled = False
            saved = backend.download_result(seen.data)
        name = "columns" if context == "fused" else "results"
        if not isinstance(saved, dict) or name not in saved:
            names = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
            raise JobError(
                f"{self.host} gave a result of an unexpected shape: {names} in place of {name!r}.",
                hint="Compare the versions of nnsight here and there: patchscope doctor --remote.",
            )
        results = saved[name]
        if context == "fused":
            return {"passes": [results], "kept": None, "kept_finals": None, "prefix": None}
        return results

    def failure(self, seen: JobStatus) -> JobError | ServerError | ModelError:
        """The error for a failed job: the job's own fault, the server's, or a model that it cannot run."""
        reason = seen.description.strip()
        if "Could not deploy this model" in reason:
            return ModelError(
                f"{self.host} cannot run this model: {reason.splitlines()[0]}.",
                hint="`patchscope doctor --remote` lists the models that run there.",
            )
        if any(text in reason for text in _PASSING) and "Traceback" not in reason:
            return ServerError(f"{self.host}: {reason}", hint=AGAIN)
        if too_long(seen):
            return JobError(
                f"{self.host}: {reason}", hint="Smaller jobs: --max-rows, or a server with more time."
            )
        last = reason.splitlines()[-1] if reason else "no reason given"
        return JobError(
            f"the job failed on {self.host}: {last}",
            hint="If it runs here without --remote, compare the versions: patchscope doctor --remote.",
        )
