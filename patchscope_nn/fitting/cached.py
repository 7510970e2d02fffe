"""A fit in closed form that a recipe asks for, before the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchscope_nn._util.digests import digest
from patchscope_nn.backends import Places
from patchscope_nn.data.rows import DataSpec
from patchscope_nn.fitting.closed.fit import fit_pairs, texts_for
from patchscope_nn.fitting.closed.states import Pairing
from patchscope_nn.fitting.planned import Planned, folder, identity, same_model
from patchscope_nn.fitting.texts import DEFAULT_DATA, Texts
from patchscope_nn.mappings import Fitted, Pair
from patchscope_nn.models import Model
from patchscope_nn.spec import Fit

#: Raised where a fit of the same options would give other maps than before.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PlannedFit(Planned):
    """A fit that a run needs.

    Attributes:
        options: What decides it.
        pairing: What reads the states.
        texts: The texts.
    """

    options: Fit
    pairing: Pairing
    texts: Texts

    @property
    def name(self) -> str:
        """How tables and manifests call it."""
        return f"fit:{self.options.kind}"

    @property
    def doing(self) -> str:
        """What its progress says is being done."""
        return f"fitting {self.name}"

    @property
    def unit(self) -> str:
        """What its progress counts."""
        return "texts"

    @property
    def about(self) -> dict[str, Any]:
        """Its kind, and where its texts come from."""
        return {"kind": self.options.kind, "texts": self.texts.about}

    def make(
        self,
        *,
        command: str | None,
        progress: Callable[[int, int], None] | None,
        notice: Callable[[str], None] | None,
    ) -> Fitted:
        """Fit the maps; arguments as in `fit_mapping`."""
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
        """The shapes of a pair's tensors, by name."""
        d_in, d_out = self.pairing.widths
        if self.options.kind == "scale":
            return {"scale": (1,)}
        if (rank := self.options.rank) is not None:
            return {"up": (d_out, rank), "down": (rank, d_in), "bias": (d_out,)}
        return {"weight": (d_out, d_in), "bias": (d_out,)}


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
    """What a run's fit will be, without fitting it.

    Args:
        options: The recipe's `fit`.
        source: M.
        target: M*.
        pairs: The (l, l*) of the run.
        sites: The name of the site that is read on each side.
        places: Where M and M* run.
        base: The folder that relative data files start from.

    Returns:
        The fit; None where every pair is a layer of one model and itself, which is identity.

    Raises:
        InputError: The data cannot be read, or is too little.
    """
    if same_model(source, target):
        target = source
        if sites[0] == sites[1] and all(layer == other for layer, other in pairs):
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
    said = [
        _VERSION,
        options.model_dump(mode="json", exclude={"data", "column", "limit"}),
        {name: one["digest"] for name, one in texts.about.items()},
        [identity(source), identity(target)],
        [list(pair) for pair in chosen],
        [*sites, pairing.skip],
    ]
    key = digest(said)
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
