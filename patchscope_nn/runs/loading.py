"""Loading M and M* where they run, and proving models on servers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from patchscope_nn.backends import Backend, Places, Server
from patchscope_nn.models import TRANSFORMERS, Model, builtin, common_base, with_adapter, with_named_adapter
from patchscope_nn.proof import load, proven, proven_on
from patchscope_nn.recipe import Recipe

#: Loads a model, like `models.load`.
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
    """Load M and M*. They are the same object if they are the same model in the same place.

    Models named by the caller override those of the recipe. A model and its LoRA adapter, or two adapters of
    one model, share the weights of the base model.

    Args:
        recipe: The recipe, which may name models; None if there is no recipe.
        places: Where the models run, and how they are loaded.
        model: Both models, in any form that `load` takes.
        source_model: M, if it is not `model`.
        target_model: M*, if it is not M.
        loader: Loads a model; None uses `load`.

    Returns:
        M and M*.

    Raises:
        InputError: A model cannot be loaded, or `dtype` is not a valid dtype.
    """
    loader = loader or load
    common = recipe.model if recipe else builtin.NAME
    source_name = _first(source_model, model, recipe and recipe.source.model, common)
    target_name = _first(target_model, model, recipe and recipe.target.model, source_name)
    source_options = places.loading("source", source_name)
    both_named = isinstance(target_name, str | Path) and isinstance(source_name, str | Path)
    same_model = target_name is source_name or (both_named and target_name == source_name)
    if places.alike and same_model:
        source = target = loader(source_name, **source_options)
    elif _weights_here(places) and (base := common_base(source_name, target_name)):
        base_model = loader(base, dtype=places.dtype, device_map=places.device_map)
        source, target = (proven(with_named_adapter(base_model, name)) for name in (source_name, target_name))
    else:
        target_options = places.loading("target", target_name)
        source, target = loader(source_name, **source_options), loader(target_name, **target_options)
    adapter = recipe and recipe.target.adapter
    return source, proven(with_adapter(target, adapter)) if adapter else target


def _first(*candidates: Any) -> Any:
    return next(candidate for candidate in candidates if candidate is not None)


def _weights_here(places: Places) -> bool:
    engines = {places.source_engine, places.target_engine}
    return engines == {TRANSFORMERS} and not any(
        isinstance(place, Server) for place in (places.source, places.target)
    )


def prove_on_servers(source: Model, target: Model, places: Places) -> tuple[Model, Model]:
    """Prove models whose weights are on a server, with a job each, unless their verdicts are cached.

    Args:
        source: M.
        target: M*.
        places: Where they run.

    Returns:
        M and M* with their verdicts; the same objects if both are in this process.

    Raises:
        ModelError: A model cannot be traced on its server.
        ServerError: A server cannot be reached.
    """
    proven_source = _proven_on(source, places.source)
    return proven_source, proven_source if target is source else _proven_on(target, places.target)


def _proven_on(model: Model, place: Backend) -> Model:
    return proven_on(model, place) if isinstance(place, Server) else model
