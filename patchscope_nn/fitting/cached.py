"""A fit in closed form that a recipe asks for, made before the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patchscope_nn._util.digests import digest
from patchscope_nn.backends import Places
from patchscope_nn.data.rows import DataSpec
from patchscope_nn.fitting.closed.fit import fit_pairs, texts_for
from patchscope_nn.fitting.closed.solve import shapes
from patchscope_nn.fitting.closed.states import Pairing
from patchscope_nn.fitting.planned import Planned, folder, identity, same_model
from patchscope_nn.fitting.texts import DEFAULT_DATA
from patchscope_nn.mappings import Pair
from patchscope_nn.models import Model
from patchscope_nn.spec import Fit

#: Raised if a fit with the same options would give other maps than before.
_VERSION = 1


def plan_fit(
    options: Fit,
    *,
    source: Model,
    target: Model,
    pairs: Sequence[Pair],
    sites: tuple[str, str],
    places: Places,
    base: Path | None = None,
) -> Planned | None:
    """Plan a run's fit, without fitting it.

    Args:
        options: The recipe's `fit`.
        source: M.
        target: M*.
        pairs: The (l, l*) of the run.
        sites: The name of the site that is read on each side.
        places: Where M and M* run.
        base: The folder that relative data files start from.

    Returns:
        The fit; None if every pair is a layer of one model and itself, so that the mapping is the identity.

    Raises:
        InputError: The data cannot be read, or is too little.
    """
    if same_model(source, target):
        target = source
        if sites[0] == sites[1] and all(layer == target_layer for layer, target_layer in pairs):
            return None
    texts = texts_for(options, DataSpec(**(options.data or DEFAULT_DATA)), base=base)
    pairing = Pairing(source=source, target=target, backend=places.backend, sites=sites, options=options)
    chosen = tuple(sorted(set(pairs)))
    decides = [
        _VERSION,
        options.model_dump(mode="json", exclude={"data", "column", "limit"}),
        {name: part["digest"] for name, part in texts.about.items()},
        [identity(source), identity(target)],
        [*sites, pairing.skip],
    ]
    key = digest([*decides[:-1], [list(pair) for pair in chosen], decides[-1]])
    name = f"fit:{options.kind}"
    return Planned(
        name=name,
        doing=f"fitting {name}",
        unit="texts",
        about={"kind": options.kind, "texts": texts.about},
        source=source,
        target=target,
        sites=sites,
        shapes=dict.fromkeys(chosen, shapes(options, *pairing.widths)),
        make=lambda **reporting: fit_pairs(options, pairing, texts, chosen, **reporting),
        key=key,
        decided_by=digest(decides),
        file=folder() / f"{options.kind}-{key}.safetensors",
    )
