"""What the page asks, checked, and as the recipe that answers it. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from patchscope_nn.errors import InputError, did_you_mean
from patchscope_nn.explore.lenses import OWN, Lens, own_lens
from patchscope_nn.readouts import Generate, NextToken
from patchscope_nn.recipe import Recipe
from patchscope_nn.spec import Source, Spec, Target, prompts
from patchscope_nn.spec.layers import LayerSelector, parse_layers
from patchscope_nn.spec.prompts import literal

#: The most tokens of a prompt that one grid shows.
WINDOW = 40
_TOP_K = 5
#: One line is one entry of the few-shot list, as in the recipe entity-description.
STOP = "\n"
_INTEGER = re.compile(r"-?\d+")


def _position(value: Any) -> Any:
    """A page's field is text; an index in it is a number."""
    return int(value) if isinstance(value, str) and _INTEGER.fullmatch(value) else value


def _layer(value: Any) -> LayerSelector:
    return parse_layers(_position(value), same=True)


_Text = Annotated[str, Field(min_length=1)]


class TargetView(Spec):
    """Where the page writes a state: T, i* and l*.

    Attributes:
        prompt: T; braces are text.
        position: i*: an index, or a text of the prompt.
        layer: l*: a block, `embed`, or `same`.
    """

    prompt: _Text = prompts.DESCRIBE
    position: Annotated[int | _Text, BeforeValidator(_position)] = -1
    layer: Annotated[LayerSelector, BeforeValidator(_layer)] = "same"

    def target(self, model: str | None) -> Target:
        """As a Patchscope has it."""
        return Target(prompt=literal(self.prompt), position=self.position, layer=self.layer, model=model)


class View(Spec):
    """What grid and cell have in common.

    Attributes:
        prompt: S; braces are text.
        source_model: M.
        target_model: M*.
    """

    prompt: _Text
    source_model: _Text
    target_model: _Text

    @property
    def other_model(self) -> str | None:
        """M*, where it is not M."""
        return None if self.target_model == self.source_model else self.target_model


class GridView(View):
    """A grid of tokens x layers, as the page asks for it.

    Attributes:
        lens: The lens's name; `own` reads with `target`.
        target: The own lens's target.
        positions: The tokens; None for all of them, or the first `WINDOW` of a longer prompt.
    """

    lens: str = "token-identity"
    target: TargetView | None = None
    positions: Annotated[
        Annotated[tuple[int, ...], Field(min_length=1, max_length=WINDOW)] | None,
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ] = None

    def recipe(self, lenses: Mapping[str, Lens]) -> Recipe:
        """The recipe that this grid shows.

        Raises:
            InputError: There is no such lens.
        """
        lens = self._lens(lenses)
        scope = lens.scope
        position: Any = {"each": "all" if self.positions is None else list(self.positions)}
        # One model's next token can be looked up in its own vocabulary; two models need not share one.
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
            return own_lens((self.target or TargetView(prompt=prompts.IDENTITY)).target(None))
        if self.lens not in lenses:
            raise InputError(
                f"{self.lens!r} is no lens here.",
                hint=f"{did_you_mean(self.lens, [*lenses, OWN])} More come with --lens RECIPE.",
            )
        return lenses[self.lens]


class CellView(View):
    """One state, as the page asks what it is.

    Attributes:
        position: i, from the left.
        layer: l.
        target: Where the state is written.
        max_new_tokens: The most tokens to decode.
    """

    position: Annotated[int, Field(ge=0)]
    layer: Annotated[int, Field(ge=0)]
    target: TargetView = TargetView()
    max_new_tokens: Annotated[int, Field(ge=1, le=200)] = 20

    def recipe(self) -> Recipe:
        """The recipe that describes this state, beside its controls."""
        return Recipe(
            name="explorer-cell",
            title=f"What is the state of layer {self.layer} at position {self.position}?",
            model=self.source_model,
            source=Source(prompt=literal(self.prompt), position=self.position, layer=self.layer),
            target=self.target.target(self.other_model),
            readout=Generate(max_new_tokens=self.max_new_tokens, stop=STOP),
            controls=("unpatched", "random"),
        )
