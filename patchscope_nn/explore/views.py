"""The page's requests: checked, and turned into the recipes that answer them. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from patchscope_nn.errors import InputError, did_you_mean
from patchscope_nn.explore.lenses import OWN, Lens, lens_of
from patchscope_nn.readouts import Generate, NextToken
from patchscope_nn.recipe import Recipe
from patchscope_nn.spec import Source, Spec, Target, prompts
from patchscope_nn.spec.layers import LayerSelector, parse_layers
from patchscope_nn.spec.prompts import literal

#: The number of tokens that a grid shows at once.
WINDOW = 40
_TOP_K = 5
#: A description is one line, as in the recipe entity-description.
STOP = "\n"
_INTEGER = re.compile(r"-?\d+")


def _position(value: Any) -> Any:
    """Convert an index, which the page sends as text, to a number."""
    return int(value) if isinstance(value, str) and _INTEGER.fullmatch(value) else value


def _layer(value: Any) -> LayerSelector:
    return parse_layers(_position(value), same=True)


_Text = Annotated[str, Field(min_length=1)]


class TargetView(Spec):
    """The target that the page gives: T, i* and l*."""

    prompt: _Text = prompts.DESCRIBE
    """T; braces are ordinary characters."""
    position: Annotated[int | _Text, BeforeValidator(_position)] = -1
    """i*: an index, or a piece of the prompt's text."""
    layer: Annotated[LayerSelector, BeforeValidator(_layer)] = "same"
    """l*: a block, `embed`, or `same`."""

    def target(self, model: str | None) -> Target:
        """Convert to the target of a Patchscope."""
        return Target(prompt=literal(self.prompt), position=self.position, layer=self.layer, model=model)


class View(Spec):
    """The common part of requests for a grid and for a cell."""

    prompt: _Text
    """S; braces are ordinary characters."""
    source_model: _Text
    """M."""
    target_model: _Text
    """M*."""

    @property
    def other_model(self) -> str | None:
        """M*, or None if it is the same as M."""
        return None if self.target_model == self.source_model else self.target_model


class GridView(View):
    """A request for a grid of tokens and layers."""

    lens: str = "token-identity"
    """The name of a lens; `own` uses `target`."""
    target: TargetView | None = None
    """The target of the lens `own`."""
    positions: Annotated[
        Annotated[tuple[int, ...], Field(min_length=1, max_length=WINDOW)] | None,
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ] = None
    """The tokens to show; None shows all, or the first `WINDOW` of a longer prompt."""

    def recipe(self, lenses: Mapping[str, Lens]) -> Recipe:
        """Make the recipe whose results this grid shows; InputError if there is no such lens."""
        lens = self._lens(lenses)
        scope = lens.scope
        position: Any = {"each": "all" if self.positions is None else list(self.positions)}
        # The source's next token is compared by its id, which may mean another token in another model.
        reference: Literal["source"] | None = "source" if self.other_model is None else None
        return Recipe(
            name="explorer-grid",
            title=f"Which next token does each state hold? ({lens.title})",
            model=self.source_model,
            source=Source(prompt=literal(self.prompt), position=position, site=scope.source.site),
            target=scope.target.model_copy(update={"model": self.other_model}),
            mapping=scope.mapping,
            readout=NextToken(top_k=_TOP_K, reference=reference, position=scope.readout.reads_at),
        )

    def _lens(self, lenses: Mapping[str, Lens]) -> Lens:
        if self.lens == OWN:
            return lens_of((self.target or TargetView(prompt=prompts.IDENTITY)).target(None))
        if self.lens not in lenses:
            raise InputError(
                f"{self.lens!r} is not a lens of this explorer.",
                hint=f"{did_you_mean(self.lens, [*lenses, OWN])} Add a recipe as a lens with --lens RECIPE.",
            )
        return lenses[self.lens]


class CellView(View):
    """A request to describe one state."""

    position: Annotated[int, Field(ge=0)]
    """i, counted from the left."""
    layer: Annotated[int, Field(ge=0)]
    """l."""
    target: TargetView = TargetView()
    """Where the state is written."""
    max_new_tokens: Annotated[int, Field(ge=1, le=200)] = 20
    """The number of tokens to decode at most."""

    def recipe(self) -> Recipe:
        """Make the recipe that describes this state, with its controls."""
        return Recipe(
            name="explorer-cell",
            title=f"What is the state of layer {self.layer} at position {self.position}?",
            model=self.source_model,
            source=Source(prompt=literal(self.prompt), position=self.position, layer=self.layer),
            target=self.target.target(self.other_model),
            readout=Generate(max_new_tokens=self.max_new_tokens, stop=STOP),
            controls=("unpatched", "random"),
        )
