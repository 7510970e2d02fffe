"""A fit in closed form that a recipe asks for, made before the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchscope_nn._util.digests import digest
from patchscope_nn.backends import Places
from patchscope_nn.data.rows import DataSpec
from patchscope_nn.fitting.closed.fit import fit_pairs, texts_for
from patchscope_nn.fitting.closed.solve import shapes
from patchscope_nn.fitting.closed.states import Pairing
from patchscope_nn.fitting.planned import Planned, folder, identity, same_model
from patchscope_nn.fitting.texts import DEFAULT_DATA, Texts
from patchscope_nn.mappings import Fitted, Pair
from patchscope_nn.models import Model
from patchscope_nn.spec import Fit

#: Raised if a fit with the same options would give other maps than before.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PlannedFit(Planned):
    """A fit that a run needs.

    Attributes:
        options: The recipe's `fit`.
        pairing: Reads the states.
        texts: The texts, split.
    """

    options: Fit
    pairing: Pairing
    texts: Texts

    @property
    def name(self) -> str:
        """As in `Planned`."""
        return f"fit:{self.options.kind}"

    @property
    def doing(self) -> str:
        """As in `Planned`."""
        return f"fitting {self.name}"

    @property
    def unit(self) -> str:
        """As in `Planned`."""
        return "texts"

    @property
    def about(self) -> dict[str, Any]:
        """As in `Planned`: the kind, and where the texts come from."""
        return {"kind": self.options.kind, "texts": self.texts.about}

    def make(
        self,
        *,
        command: str | None,
        progress: Callable[[int, int], None] | None,
        notice: Callable[[str], None] | None,
    ) -> Fitted:
        """As in `Planned`."""
        return fit_pairs(
            self.options,
            self.pairing,
            self.texts,
            self.pairs,
            command=command,
            progress=progress,
            notice=notice,
        )

    def shapes(self, pair: Pair) -> dict[str, tuple[int, ...]]:  # noqa: ARG002 (all pairs have the same)
        """As in `Planned`."""
        d_in, d_out = self.pairing.widths
        return shapes(self.options, d_in=d_in, d_out=d_out)


def plan_fit(
    options: Fit,
    *,
    source: Model,
    target: Model,
    pairs: Sequence[Pair],
    sites: tuple[str, str],
    places: Places,
    base: Path | None = None,
) -> PlannedFit | None:
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
    pairing = Pairing(
        source=source,
        target=target,
        backend=places.backend,
        sites=sites,
        options=options,
    )
    chosen = tuple(sorted(set(pairs)))
    key = digest(
        [
            _VERSION,
            options.model_dump(mode="json", exclude={"data", "column", "limit"}),
            {name: part["digest"] for name, part in texts.about.items()},
            [identity(source), identity(target)],
            [list(pair) for pair in chosen],
            [*sites, pairing.skip],
        ]
    )
    return PlannedFit(
        options=options,
        source=source,
        target=target,
        sites=sites,
        pairing=pairing,
        texts=texts,
        pairs=chosen,
        key=key,
        file=folder() / f"{options.kind}-{key}.safetensors",
    )
