"""Backends open the context of a step, each in its own place; `Places` says where M and M* run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from patchscope_nn.backends.crossing import source_half, target_half
from patchscope_nn.backends.jobs.client import JobClient, wait
from patchscope_nn.backends.ndif.client import NdifClient, host_of
from patchscope_nn.backends.served.client import SCHEMES, served_client
from patchscope_nn.body.contexts import Hear
from patchscope_nn.body.program import Results, StepProgram
from patchscope_nn.engines import engine_of
from patchscope_nn.errors import InputError, did_you_mean
from patchscope_nn.models import TRANSFORMERS, VLLM, Model
from patchscope_nn.plan import Context


class Backend(ABC):
    """Runs steps in one place, or in one for each model.

    Attributes:
        remote: True if each request can run only one model.
        engine: The engine of all its models; None if it has several engines.
    """

    remote: bool
    engine: ClassVar[str | None] = None

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name in manifests."""

    def run(
        self,
        context: Context,
        program: StepProgram,
        *,
        source: Model,
        target: Model,
        hear: Sequence[Hear] = (),
    ) -> Results:
        """Open the context, run the step, and return its results.

        `hear` has a function for each target pass, to be called while the pass runs. Only a backend that runs
        in this process calls them. A context that the target's engine does not open runs as two sessions.
        """
        if engine_of(target).opens(context):
            return self._run(context, program, source, target, hear)
        return Bridged(self, self).run(context, program, source=source, target=target, hear=hear)

    def _run(
        self, context: Context, program: StepProgram, source: Model, target: Model, hear: Sequence[Hear]
    ) -> Results:
        """Run a step in a context that the target's engine opens."""
        raise NotImplementedError


@dataclass(frozen=True)
class Local(Backend):
    """Runs steps in this process."""

    name: str = "local"
    remote: bool = False

    def _run(
        self, context: Context, program: StepProgram, source: Model, target: Model, hear: Sequence[Hear]
    ) -> Results:
        return engine_of(target).run(context, program, source=source, target=target, hear=hear)


@dataclass(frozen=True)
class Rehearsal(Backend):
    """Rehearses a remote run: nnsight serialises each request, reads it back, and runs it in this process.

    A step that fails here also fails on a server; a step that passes here can still fail there.
    """

    name: str = "rehearsal"
    remote: bool = True
    engine: ClassVar[str | None] = TRANSFORMERS

    def _run(
        self, context: Context, program: StepProgram, source: Model, target: Model, _hear: Sequence[Hear]
    ) -> Results:
        from nnsight.intervention.backends.local import LocalSimulationBackend

        backend = LocalSimulationBackend(target.traced)
        return engine_of(target).run(context, program, source=source, target=target, backend=backend)


@dataclass(frozen=True)
class Server(Backend):
    """Runs steps on a server, given by its URL; each step is a job."""

    host: str
    remote: bool = True

    def _run(
        self, context: Context, program: StepProgram, _source: Model, target: Model, _hear: Sequence[Hear]
    ) -> Results:
        client = client_of(self.host)
        return wait(client, client.submit(context, program, target), context)


@dataclass(frozen=True)
class Ndif(Server):
    """Runs steps on an NDIF server."""

    name: str = "ndif"
    engine: ClassVar[str | None] = TRANSFORMERS


@dataclass(frozen=True)
class Served(Server):
    """Runs steps on a vLLM engine that `patchscope serve` serves."""

    name: str = "served"
    engine: ClassVar[str | None] = VLLM


def client_of(host: str) -> JobClient:
    """Return the client of a server, given by its URL."""
    return served_client(host) if host.startswith(SCHEMES) else NdifClient(host)


@dataclass(frozen=True)
class Bridged(Backend):
    """Runs M at `source` and M* at `target`; the states of M travel to M* as values."""

    source: Backend
    target: Backend
    remote: bool = True

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.source.name} -> {self.target.name}"

    def run(
        self,
        _context: Context,
        program: StepProgram,
        *,
        source: Model,
        target: Model,
        hear: Sequence[Hear] = (),
    ) -> Results:
        """Run the half of a step that reads the source, then the half that writes the target."""
        read = self.source.run("session", source_half(program), source=source, target=source)
        half = target_half(program, read)
        return self.target.run("session", half, source=target, target=target, hear=hear)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where M and M* run, on which engine, and how models that are passed by name are loaded there.

    The options of a run are resolved here, once; a prepared run holds the result.

    Attributes:
        source: Where M runs.
        target: Where M* runs.
        source_engine: The engine of M.
        target_engine: The engine of M*.
        dtype: The dtype of models that are loaded, as in `proof.load`.
        device_map: The devices of models that are loaded, as in `proof.load`.
        engine_args: The arguments of the engine vllm, by name.
    """

    source: Backend = Local()
    target: Backend = Local()
    source_engine: str = TRANSFORMERS
    target_engine: str = TRANSFORMERS
    dtype: Any = "auto"
    device_map: Any = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        remote: bool | str = False,  # noqa: FBT001, FBT002 (the value of an option, as users give it)
        source_remote: bool | str | None = None,  # noqa: FBT001 (the same)
        *,
        engine: str | None = None,
        source_engine: str | None = None,
        **loading: Any,
    ) -> Places:
        """Resolve the options of a run.

        Args:
            remote: Where M* runs. False: in this process; True: on the NDIF that nnsight is configured for;
                a URL: on that server, of NDIF or, as `vllm+http://...`, of `patchscope serve`; `local`: in
                this process, as a rehearsal of a server.
            source_remote: Where M runs, with the same values; None: where M* runs.
            engine: The engine of M*: `transformers` or `vllm`; None: what its place runs.
            source_engine: The engine of M; None: that of M*, if M runs in the same place.
            **loading: `dtype`, `device_map` and `engine_args`.

        Raises:
            InputError: A value is not one of these.
        """
        target = _place(remote)
        source = target if source_remote is None else _place(source_remote)
        target_engine = _engine(target, engine, field="engine")
        if source_engine is None and source == target:
            source_engine = target_engine
        return cls(
            source=source,
            target=target,
            source_engine=_engine(source, source_engine, field="source_engine"),
            target_engine=target_engine,
            **{name: value for name, value in loading.items() if value is not None},
        )

    @property
    def backend(self) -> Backend:
        """The backend that runs steps with both models."""
        return self.target if self.source == self.target else Bridged(self.source, self.target)

    @property
    def alike(self) -> bool:
        """True if M and M* have the same place and the same engine."""
        return self.source == self.target and self.source_engine == self.target_engine

    def loading(self, side: Literal["source", "target"], model: Any) -> dict[str, Any]:
        """Return the options that load M or M*, given in any form that `load` takes, for its place.

        Servers have their own weights. A server of vLLM is asked whether it runs the model.

        Raises:
            InputError: The options do not fit the place, or its server does not run the model.
            ServerError: Its server cannot be reached.
        """
        place, engine = getattr(self, side), getattr(self, f"{side}_engine")
        options = {"dtype": self.dtype, "device_map": self.device_map, "engine": engine}
        if engine == VLLM:
            if self.device_map is not None:
                raise InputError(
                    "device_map belongs to the engine transformers.",
                    hint="vLLM divides a model by engine arguments, for example tensor_parallel_size=4.",
                )
            del options["device_map"]
            options |= self.engine_args
        if isinstance(place, Served) and isinstance(model, str | Path):
            about = served_client(place.host).check_model(str(model))
            known = ("dtype", "max_model_len", "held_tokens", "held_block")
            options |= {name: getattr(about, name) for name in known}
        return {**options, "weights": not isinstance(place, Server)}


def _place(remote: bool | str) -> Backend:  # noqa: FBT001 (the value of an option, as users give it)
    if remote is False:
        return Local()
    if remote == "local":
        return Rehearsal()
    if str(remote).startswith(SCHEMES):
        return Served(str(remote).rstrip("/"))
    return Ndif(host_of(remote))


def _engine(place: Backend, engine: str | None, *, field: str) -> str:
    """Return the engine of a place, and check that it is the one that was asked for."""
    if engine not in (None, TRANSFORMERS, VLLM):
        raise InputError(
            f"{field}={engine!r} is not an engine.", hint=did_you_mean(str(engine), (TRANSFORMERS, VLLM))
        )
    if place.engine is None:
        return engine or TRANSFORMERS
    if engine not in (None, place.engine):
        raise InputError(
            f"{field}={engine!r}: {place.name} runs models with {place.engine}.",
            hint=f"Leave {field} out, or use another place (remote).",
        )
    return place.engine
