"""Lenses: the next-token Patchscopes that read a whole grid of states. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchscope_nn.errors import InputError
from patchscope_nn.recipe import Recipe, load_recipe, shipped
from patchscope_nn.spec import Patchscope, Source, Target, prompts

#: The name of the lens whose target is set on the page.
OWN = "own"
_PLACEHOLDER = re.compile(r"(?<!\{)(?:\{\{)*\{[A-Za-z_]\w*\}")
#: The source of a lens, until the page gives a prompt.
_ANY = Source(prompt="-")


@dataclass(frozen=True, kw_only=True)
class Lens:
    """A way to read the states of a grid; the page sets the scope's prompt, position and layers."""

    name: str
    title: str
    scope: Patchscope


def lens_of(target: Target, *, name: str = OWN, title: str = "Own target") -> Lens:
    """Make a lens with a target, by default one that the user chose."""
    return Lens(name=name, title=title, scope=Patchscope(source=_ANY, target=target))


def lenses(recipes: Sequence[str | Path] = ()) -> dict[str, Lens]:
    """Collect the lenses by name: token identity, the logit lens, and next-token recipes.

    Args:
        recipes: Names or files of recipes to add to those that ship.

    Raises:
        InputError: One of `recipes` cannot be read, or cannot serve as a lens.
    """
    identity = Target(prompt=prompts.IDENTITY, position=-1)
    # After the last block only norm and unembedding are left, so that the prompt does not matter.
    logit_lens = Target(prompt="?", position=-1, layer=-1)
    by_name = {
        "token-identity": lens_of(identity, name="token-identity", title="Token identity"),
        "logit-lens": lens_of(logit_lens, name="logit-lens", title="Logit lens"),
    }
    known = [lens.scope.target for lens in by_name.values()]
    for name in shipped():
        recipe = load_recipe(name)
        if _obstacle(recipe) is None and recipe.target not in [*known, Target(layer=-1)]:
            by_name[name] = _lens(recipe, name)
    for path in recipes:
        recipe = load_recipe(path)
        obstacle = _obstacle(recipe)
        if obstacle is not None:
            raise InputError(
                f"the recipe {str(path)!r} cannot serve as a lens: {obstacle}.",
                hint="A lens is a next_token recipe whose target is the same for every data row.",
            )
        by_name[recipe.name] = _lens(recipe, recipe.name)
    return by_name


def _lens(recipe: Recipe, name: str) -> Lens:
    source = _ANY.model_copy(update={"site": recipe.source.site})
    return Lens(name=name, title=recipe.title, scope=recipe.scope.model_copy(update={"source": source}))


def _obstacle(recipe: Recipe) -> str | None:
    """Say why a recipe cannot serve as a lens, or return None if it can."""
    if recipe.readout.odds is None or recipe.readout.decodes:
        return f"its readout is {recipe.readout.name}"
    if isinstance(recipe.mapping, tuple):
        return "its mapping is a file"
    if _PLACEHOLDER.search(str(prompts.dump_prompt(recipe.target.prompt or ""))):
        return "its target prompt contains columns of the data"
    return None
