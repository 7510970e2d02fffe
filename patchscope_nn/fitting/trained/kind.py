"""The contract of a trained kind: its options, and for recipes its shapes, its checks and its data.

A kind is one file of this folder: the function that fits it, and an object that describes it. `kinds.py`
lists the objects. `ps.fit`, `patchscope fit` and recipes (`mapping: {train: ...}`) use nothing else.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from patchscope_nn.data.rows import DataSpec
from patchscope_nn.fitting.trained.outcome import FittedPrompt, Outcome
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.mappings import Pair
from patchscope_nn.models import Model
from patchscope_nn.spec import Patchscope, Source, Target, Train


class Option(NamedTuple):
    """The description of a keyword argument of a fit, in its annotation. The command line reads it too.

    Attributes:
        help: One phrase.
        least: The smallest number it takes; None if it is not a number, or may be any.
        selector: True for layers and offsets, which are written as in YAML: `all`, `[0, 4]`, `0:10`.
    """

    help: str
    least: int | None = None
    selector: bool = False


Layers: TypeAlias = Annotated[Any, Option("Which layers: all, 5, [0, 4, 8] or 0:10.", selector=True)]
MaxTokens: TypeAlias = Annotated[int, Option("How many tokens of a text are read.", 2)]
SkipFirst: TypeAlias = Annotated[int, Option("How many tokens at a text's beginning are left out.", 0)]
RowsAtATime: TypeAlias = Annotated[int, Option("Rows of a Jacobian that a backward pass gives.", 1)]
HeldOut: TypeAlias = Annotated[float, Option(str(Training.model_fields["held_out"].description))]
Seed: TypeAlias = Annotated[int, Option(str(Training.model_fields["seed"].description), 0)]


class Rows(NamedTuple):
    """The data of a training that a recipe asks for; `column` has the texts, for kinds that read texts."""

    spec: DataSpec
    column: str | None
    rows: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A training that a recipe asks for.

    Attributes:
        options: The recipe's `train`.
        scope: The Patchscope.
        source: M.
        target: M*; the same object if there is one model.
        pairs: The (l, l*) of the run.
        sites: The names of the sites that are read and written.
    """

    options: Train
    scope: Patchscope
    source: Model
    target: Model
    pairs: tuple[Pair, ...]
    sites: tuple[str, str]

    @property
    def away(self) -> bool:
        """True if the weights of a model are not in this process."""
        return any(not model.info.weights_here for model in (self.source, self.target))

    @property
    def prompts(self) -> tuple[Source, Target]:
        """The recipe's source and target without models, which are passed to a fit separately."""
        here = {"model": None}
        return self.scope.source.model_copy(update=here), self.scope.target.model_copy(update=here)


@dataclass(frozen=True, kw_only=True)
class TrainedKind:
    """A kind of mapping or prompt that is trained, or differentiated, through a frozen model.

    Attributes:
        name: What `ps.fit`, `patchscope fit` and recipes call it.
        summary: One sentence for `patchscope fit --help`.
        fit: Takes a model, the data, keyword arguments, and `progress`. Its keyword arguments are the kind's
            options; an `Option` in the annotation describes each. `training`, `source` and `target` have
            none, because the command line offers the same options for them in every kind.
        reads: `texts` if the data are texts of one column, `rows` if they are whole data rows.
        training: How it is trained by default; None if it takes no steps.
        data: What `patchscope fit` trains on by default; None if data must be named.
        unit: What progress counts.
        two_models: True if states of one model may be written into another.
    """

    name: str
    summary: str
    fit: Callable[..., Outcome | FittedPrompt] = field(repr=False)
    reads: Literal["texts", "rows"]
    training: Training | None = None
    data: str | None = None
    unit: str = "steps"
    two_models: bool = False

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The keyword arguments of `fit` that a user sets."""
        return {
            name: parameter
            for name, parameter in inspect.signature(self.fit, eval_str=True).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in ("kind", "progress", "target_model")
        }


@dataclass(frozen=True, kw_only=True)
class MappingKind(TrainedKind, ABC):
    """A trained kind that gives a mapping, so that recipes can ask for it.

    `uses_prompts` is true if the recipe's source and target decide the maps.
    """

    uses_prompts: bool = False

    @abstractmethod
    def shapes(self, d_model: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of a pair's map, by name."""

    def learns(self, pair: Pair) -> bool:  # noqa: ARG002 (kinds that cannot learn a pair say so)
        """True if there is something to learn for a pair; otherwise its map is the identity."""
        return True

    @abstractmethod
    def check(self, request: Request) -> None:
        """Check that the kind fits the Patchscope and the models.

        Raises:
            LayerError: The kind has no map to one of the target layers.
            MappingError: The kind does not fit the prompts, sites or models.
        """

    @abstractmethod
    def check_data(self, request: Request, data: Rows) -> None:
        """Check the data before anything runs: columns, prompts, positions, and how many there are.

        Raises:
            InputError: The data does not fill a prompt or is too little.
        """

    def column(self, options: Train) -> str | None:
        """The column of the texts that a recipe names, or means."""
        return options.column

    @abstractmethod
    def arguments(self, request: Request, layers: Sequence[int]) -> dict[str, Any]:
        """The keyword arguments of `fit` for a recipe; `layers` are the l that have something to learn."""

    def training_of(self, options: Train) -> Training:
        """The kind's way of training, changed as a recipe says."""
        default = (self.training or Training()).model_dump()
        changed = {name: value for name, value in options.options.items() if name in default}
        return Training(**default | changed | {"seed": options.seed})

    def own_options(self, options: Train) -> dict[str, Any]:
        """The options of a recipe that are neither of the data nor of the training."""
        others = {"column"} | (set(Training.model_fields) if self.training else set())
        return {name: value for name, value in options.options.items() if name not in others}

    def option(self, options: Train, name: str) -> Any:
        """An option as a recipe gives it, or its default."""
        return options.options.get(name, self.parameters[name].default)
