"""Groups of options that several commands share; a command takes a group as a single parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any

from patchscope_nn.cli import options

if TYPE_CHECKING:
    from patchscope_nn.backends import Places


@dataclass(frozen=True, kw_only=True)
class OneModel:
    """The options for a single model in this process."""

    model: options.Model = None
    dtype: options.Dtype = "auto"
    device_map: options.DeviceMap = None

    def load(self) -> Any:
        """Load the model, by default the builtin one; InputError if it cannot be loaded."""
        from patchscope_nn.models import builtin
        from patchscope_nn.proof import load

        return load(self.model or builtin.NAME, dtype=self.dtype, device_map=self.device_map)


@dataclass(frozen=True, kw_only=True)
class Models:
    """The options for M and M*, how they are loaded, and where they run."""

    model: options.Model = None
    source_model: options.SourceModel = None
    target_model: options.TargetModel = None
    dtype: options.Dtype = "auto"
    device_map: options.DeviceMap = None
    engine: options.Engine = None
    source_engine: options.SourceEngine = None
    engine_args: options.EngineArgs = None
    remote: options.Remote = None
    source_remote: options.SourceRemote = None

    @property
    def names(self) -> dict[str, Any]:
        """The arguments of `prepare` that name the models."""
        return {"model": self.model, "source_model": self.source_model, "target_model": self.target_model}

    @property
    def where(self) -> dict[str, Any]:
        """The arguments `remote` and `source_remote` of `run`."""
        source = None if self.source_remote is None else options.remote_value(self.source_remote)
        return {"remote": options.remote_value(self.remote), "source_remote": source}

    @property
    def placing(self) -> dict[str, Any]:
        """The arguments of `run` that say where models run, and how they are loaded."""
        return {
            **self.where,
            "dtype": self.dtype,
            "device_map": self.device_map,
            "engine": self.engine,
            "source_engine": self.source_engine,
            "engine_args": options.engine_arguments(self.engine_args) or None,
        }

    def places(self) -> Places:
        """Return where M and M* run, and how they are loaded; InputError if an option is not a place."""
        from patchscope_nn.backends import Places

        return Places.of(**self.placing)


#: The planner's optimisations and their help texts. Results are the same when an optimisation is off.
_SWITCHES = {
    "deduplication": "Run identical cells once.",
    "source_sharing": "Run a source prompt once for all states read from it.",
    "row_packing": "Run many cells in one forward pass.",
    "cached_decoding": "Reuse the prompt's keys and values when decoding.",
    "mixed_lengths": "Let prompts of different lengths share a forward pass.",
    "prefix_sharing": "Run a common prefix of target prompts once.",
    "late_entry": "Skip the blocks below l*.",
    "shared_attention": "Attend to a shared prefix separately from each cell's own tokens.",
    "lean_readout": "Unembed only the positions that are read.",
    "early_leaving": "Remove rows that have finished generating from the batch.",
    "memory_reuse": "On a CPU under Linux, reuse the memory of the previous pass.",
    "overlap": "Prepare the next step and write the previous one while a step runs.",
}
Switches: Any = make_dataclass(
    "Switches",
    [(name, Annotated[bool, options.switch(name, text)], True) for name, text in _SWITCHES.items()],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class Planning:
    """The options for planning passes."""

    context: options.ContextName = "auto"
    max_rows: options.MaxRows = None
    memory: options.Memory = None

    def execution_options(self, switches: Any) -> dict[str, Any]:
        """Return these options as arguments of `Execution`, with the optimisations that are switched on."""
        from patchscope_nn.plan import Optimisations

        return {
            "context": self.context,
            "max_rows": self.max_rows,
            "memory": options.memory_value(self.memory),
            "optimisations": Optimisations(**asdict(switches)),
        }


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter that is a dataclass of options by its options: typer needs a flat signature."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        group: Any = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[name] = group
            flat += inspect.signature(group, eval_str=True).parameters.values()
        else:
            flat.append(parameter)

    @functools.wraps(command)
    def call(**values: Any) -> None:
        group_values = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **group_values)

    call.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]  # inspect's own name
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return call
