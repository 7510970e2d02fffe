"""Options that several commands share, in groups: a command names a group as one parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from patchscope_nn.cli import options

if TYPE_CHECKING:
    from patchscope_nn.backends import Places


@dataclass(frozen=True, kw_only=True)
class OneModel:
    """A model in this process."""

    model: options.Model = None
    dtype: options.Dtype = "auto"
    device_map: options.DeviceMap = None

    def load(self) -> Any:
        """Load it; the builtin model unless another is named.

        Raises:
            InputError: It cannot be loaded.
        """
        from patchscope_nn.models import builtin
        from patchscope_nn.proof import load

        return load(self.model or builtin.NAME, dtype=self.dtype, device_map=self.device_map)


@dataclass(frozen=True, kw_only=True)
class Models:
    """M and M*, how they are loaded, and where they run."""

    model: options.Model = None
    source_model: options.SourceModel = None
    target_model: options.TargetModel = None
    dtype: options.Dtype = "auto"
    device_map: options.DeviceMap = None
    remote: options.Remote = None
    source_remote: options.SourceRemote = None

    @property
    def names(self) -> dict[str, Any]:
        """What says which models, as `prepare` takes it."""
        return {
            "model": self.model,
            "source_model": self.source_model,
            "target_model": self.target_model,
        }

    @property
    def where(self) -> dict[str, Any]:
        """`remote` and `source_remote`, as Python has them."""
        return {
            "remote": options.remote_value(self.remote),
            "source_remote": options.source_remote_value(self.source_remote),
        }

    def places(self) -> Places:
        """Where M and M* run.

        Raises:
            InputError: An option names no place.
        """
        from patchscope_nn.backends import Places

        return Places.of(**self.where, dtype=self.dtype, device_map=self.device_map)


#: What the planner may do to run less, and what `--help` says of it. Turned off, each gives the same numbers.
_SWITCHES = {
    "deduplication": "Run equal cells once.",
    "source_sharing": "Run a source prompt once for all that is read of it.",
    "row_packing": "Run many cells in a pass.",
    "cached_decoding": "Decode from the prompt's keys and values.",
    "mixed_lengths": "Let prompts of different lengths share a pass.",
    "prefix_sharing": "Run what target prompts begin with once.",
    "late_entry": "Let a cell skip the blocks below l*.",
    "shared_attention": "Attend to what cells share apart from what is their own.",
    "lean_readout": "Unembed only the positions that are read.",
    "early_leaving": "Let rows that met their end leave the batch.",
    "memory_reuse": "Keep the memory of one pass for the next, on a CPU under Linux.",
}
Switches: Any = make_dataclass(
    "Switches",
    [(name, Annotated[bool, options.switch(name, help=text)], True) for name, text in _SWITCHES.items()],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class Planning:
    """How passes are planned."""

    context: options.ContextName = options.Context.auto
    max_rows: options.MaxRows = None
    memory: options.Memory = None

    def given(self, switches: Any) -> dict[str, Any]:
        """The same as `Execution` takes it, with the optimisations that are switched on.

        Raises:
            InputError: `--memory` is no size.
        """
        from patchscope_nn.plan import Optimisations

        return {
            "context": self.context.value,
            "max_rows": self.max_rows,
            "memory": options.memory_value(self.memory),
            "optimisations": Optimisations(**asdict(switches)),
        }


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Spread each parameter that is a group into its options, since typer reads one flat signature.

    Args:
        command: A command with parameters whose types are dataclasses of options.

    Returns:
        The command as typer takes it.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if is_dataclass(parameter.annotation)
    }
    flat: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        flat += _options_of(groups[name]) if name in groups else [parameter]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    call.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]  # inspect's own name
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return call


def _options_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]
