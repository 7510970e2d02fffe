"""M and M*: loaded where they run, and proven there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from patchscope_nn.backends import Backend, Ndif, Places
from patchscope_nn.models import Model, builtin, common_base, with_adapter, with_named_adapter
from patchscope_nn.proof import load, proven, proven_on
from patchscope_nn.recipe import Recipe

#: Loads a model, as `models.load` does.
Loader: TypeAlias = Callable[..., Model]


def load_models(
    recipe: Recipe | None = None,
    *,
    places: Places,
    model: Any = None,
    source_model: Any = None,
    target_model: Any = None,
    loader: Loader | None = None,
) -> tuple[Model, Model]:
    """Load M and M*; both are one object where they are one model in one place.

    What the caller names comes before what the recipe names. A model and its LoRA adapter, or two adapters of
    one model, share the weights that no adapter changes.

    Args:
        recipe: The recipe, which may name models; None stands for one that names none.
        places: Where the models run, and how they are loaded.
        model: Both models: what `load` takes.
        source_model: M, where it is not `model`.
        target_model: M*, where it is not M.
        loader: Loads a model; None is `load`.

    Returns:
        M and M*.

    Raises:
        InputError: A model cannot be loaded, or `dtype` is not a dtype.
    """
    loader = loader or load
    common = recipe.model if recipe else builtin.NAME
    ours = _first(source_model, model, recipe and recipe.source.model, common)
    theirs = _first(target_model, model, recipe and recipe.target.model, ours)
    source_options, target_options = places.loading(places.source), places.loading(places.target)
    both_named = isinstance(theirs, str | Path) and isinstance(ours, str | Path)
    if places.source == places.target and (theirs is ours or (both_named and theirs == ours)):
        source = target = loader(ours, **source_options)
    elif _weights_here(places) and (base := common_base(ours, theirs)):
        plain = loader(base, dtype=places.dtype, device_map=places.device_map)
        source, target = (proven(with_named_adapter(plain, name)) for name in (ours, theirs))
    else:
        source, target = loader(ours, **source_options), loader(theirs, **target_options)
    adapter = recipe and recipe.target.adapter
    return source, proven(with_adapter(target, adapter)) if adapter else target


def _first(*candidates: Any) -> Any:
    return next(candidate for candidate in candidates if candidate is not None)


def _weights_here(places: Places) -> bool:
    return not any(isinstance(place, Ndif) for place in (places.source, places.target))


def prove_on_servers(source: Model, target: Model, places: Places) -> tuple[Model, Model]:
    """Prove models whose weights are on a server, by a job each, the first time they are met.

    Args:
        source: M.
        target: M*.
        places: Where they run.

    Returns:
        M and M*, with what was found; the same objects where both are in this process.

    Raises:
        ModelError: A model cannot be traced there.
        ServerError: A server cannot be reached.
    """
    found = _proven_on(source, places.source)
    return found, found if target is source else _proven_on(target, places.target)


def _proven_on(model: Model, place: Backend) -> Model:
    return proven_on(model, place) if isinstance(place, Ndif) else model
