"""Lenses: the next-token Patchscopes that read a whole grid of states. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchscope_nn.errors import InputError
from patchscope_nn.recipe import Recipe, load_recipe, shipped
from patchscope_nn.spec import Patchscope, Source, Target, prompts

#: The lens whose target the page gives.
OWN = "own"
_PLACEHOLDER = re.compile(r"(?<!\{)(?:\{\{)*\{[A-Za-z_]\w*\}")
#: What a lens is before it is given a prompt.
_ANY = Source(prompt="-")


@dataclass(frozen=True, kw_only=True)
class Lens:
    """One way to read a grid.

    Attributes:
        name: Its short name, which links hold.
        title: How the page calls it.
        scope: The Patchscope; its source's prompt, position and layers are the page's to give.
    """

    name: str
    title: str
    scope: Patchscope


def own_lens(target: Target) -> Lens:
    """A lens of the user's own target."""
    return Lens(name=OWN, title="Own target", scope=Patchscope(source=_ANY, target=target))


def lenses(recipes: Sequence[str | Path] = ()) -> dict[str, Lens]:
    """The lenses there are: token identity, the logit lens, and next-token recipes, by name.

    Args:
        recipes: Names or files of more recipes than those that ship.

    Raises:
        InputError: A recipe that is asked for cannot be read, or is no lens.
    """
    found = {
        "token-identity": Lens(
            name="token-identity",
            title="Token identity",
            scope=Patchscope(source=_ANY, target=Target(prompt=prompts.IDENTITY, position=-1)),
        ),
        # At the last block only norm and unembedding are left, whatever prompt the state stands in.
        "logit-lens": Lens(
            name="logit-lens",
            title="Logit lens",
            scope=Patchscope(source=_ANY, target=Target(prompt="?", position=-1, layer=-1)),
        ),
    }
    known = [one.scope.target for one in found.values()]
    for name in shipped():
        recipe = load_recipe(name)
        if _why_not(recipe) is None and recipe.target not in [*known, Target(layer=-1)]:
            found[name] = _lens(recipe, name)
    for given in recipes:
        recipe = load_recipe(given)
        reason = _why_not(recipe)
        if reason is not None:
            raise InputError(
                f"the recipe {str(given)!r} is no lens: {reason}.",
                hint="A lens is a next_token recipe whose target is the same for every data row.",
            )
        found[recipe.name] = _lens(recipe, recipe.name)
    return found


def _lens(recipe: Recipe, name: str) -> Lens:
    scope = recipe.scope.model_copy(update={"source": _ANY.model_copy(update={"site": recipe.source.site})})
    return Lens(name=name, title=recipe.title, scope=scope)


def _why_not(recipe: Recipe) -> str | None:
    """What keeps a recipe from being a lens."""
    if recipe.readout.odds is None or recipe.readout.decodes:
        return f"it reads {recipe.readout.name}"
    if isinstance(recipe.mapping, tuple):
        return "its mapping is a file"
    if _PLACEHOLDER.search(str(prompts.dump_prompt(recipe.target.prompt or ""))):
        return "its target prompt has columns of the data"
    return None
