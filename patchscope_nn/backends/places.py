"""Backends open the context of a step, each in its own place; `Places` says where M and M* run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from patchscope_nn.backends.crossing import source_half, target_half
from patchscope_nn.backends.ndif import client
from patchscope_nn.body.contexts import Hear
from patchscope_nn.body.program import Results, StepProgram
from patchscope_nn.engines import engine_of
from patchscope_nn.models import Model
from patchscope_nn.plan import Context


class Backend(ABC):
    """Runs steps in one place, or in one for each model.

    Attributes:
        remote: True if each request can run only one model.
    """

    remote: bool

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

    def _run(
        self, context: Context, program: StepProgram, source: Model, target: Model, _hear: Sequence[Hear]
    ) -> Results:
        from nnsight.intervention.backends.local import LocalSimulationBackend

        backend = LocalSimulationBackend(target.traced)
        return engine_of(target).run(context, program, source=source, target=target, backend=backend)


@dataclass(frozen=True)
class Ndif(Backend):
    """Runs steps on an NDIF server, given by its URL; each step is a job."""

    host: str
    name: str = "ndif"
    remote: bool = True

    def _run(
        self, context: Context, program: StepProgram, _source: Model, target: Model, _hear: Sequence[Hear]
    ) -> Results:
        return client.wait(self.host, client.submit(self.host, context, program, target), context)


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
    """Where M and M* run, and how models that are passed by name are loaded there.

    The options of a run are resolved here, once; a prepared run holds the result.

    Attributes:
        source: Where M runs.
        target: Where M* runs.
        dtype: The dtype of models that are loaded, as in `proof.load`.
        device_map: The devices of models that are loaded, as in `proof.load`.
    """

    source: Backend = Local()
    target: Backend = Local()
    dtype: Any = "auto"
    device_map: Any = None

    @classmethod
    def of(
        cls,
        remote: bool | str = False,  # noqa: FBT001, FBT002 (the value of an option, as users give it)
        source_remote: bool | str | None = None,  # noqa: FBT001 (the same)
        **loading: Any,
    ) -> Places:
        """Resolve the options of a run.

        Args:
            remote: Where M* runs. False: in this process; True: on the NDIF that nnsight is configured for;
                a URL: on that server; `local`: in this process, as a rehearsal of a server.
            source_remote: Where M runs, with the same values; None: where M* runs.
            **loading: `dtype` and `device_map`.

        Raises:
            InputError: A value is not one of these.
        """
        target = _place(remote)
        source = target if source_remote is None else _place(source_remote)
        return cls(source=source, target=target, **loading)

    @property
    def backend(self) -> Backend:
        """The backend that runs steps with both models."""
        return self.target if self.source == self.target else Bridged(self.source, self.target)

    def loading(self, place: Backend) -> dict[str, Any]:
        """Return the options that load a model for a place. Servers have their own weights."""
        return {"dtype": self.dtype, "device_map": self.device_map, "weights": not isinstance(place, Ndif)}


def _place(remote: bool | str) -> Backend:  # noqa: FBT001 (the value of an option, as users give it)
    if remote is False:
        return Local()
    return Rehearsal() if remote == "local" else Ndif(client.host_of(remote))
