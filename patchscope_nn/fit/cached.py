"""A fit that a recipe asks for: found in the user's cache, or fitted before the run and put there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from patchscope_nn import builtin
from patchscope_nn.backends import backend_for
from patchscope_nn.data import DataSpec
from patchscope_nn.fit.run import fit_pairs
from patchscope_nn.fit.states import Pairing
from patchscope_nn.fit.texts import DEFAULT_DATA, Texts, read_texts
from patchscope_nn.mappings import Pair, Parts, ResolvedMapping, resolve_mapping
from patchscope_nn.models import ELSEWHERE, Model
from patchscope_nn.spec import Fit

#: Raised where a fit of the same options would give other maps than before.
_VERSION = 1
#: How many numbers of each tensor tell a model's weights apart from another's.
_SAMPLED = 64


@dataclass(frozen=True, kw_only=True)
class PlannedFit:
    """A fit that a run needs.

    Attributes:
        options: What decides it.
        pairing: What reads the states.
        texts: The texts.
        pairs: The pairs of the run.
        key: Hex digest of everything that decides the maps.
        file: Where it is kept.
    """

    options: Fit
    pairing: Pairing
    texts: Texts
    pairs: tuple[Pair, ...]
    key: str
    file: Path

    @property
    def done(self) -> bool:
        """Whether it has been fitted before."""
        return self.file.is_file()

    @property
    def name(self) -> str:
        """How tables and manifests call it."""
        return f"fit:{self.options.kind}"

    def mapping(self) -> ResolvedMapping:
        """The mapping; before it is fitted one whose tensors have shapes and no numbers.

        Its digest is that of what decides the maps, so that a run is the same before and after.
        """
        if not self.done:
            about = {"kind": self.options.kind, "file": str(self.file), "texts": self.texts.about}
            return ResolvedMapping(
                name=self.name, kind="pairs", maps=self._shapes(), digest=self.key, about=about
            )
        found = resolve_mapping(
            ("fitted", str(self.file)),
            source=self.pairing.source.info,
            target=self.pairing.target.info,
            pairs=self.pairs,
            sites=self.pairing.sites,
        )
        return replace(found, name=self.name, digest=self.key)

    def ready(
        self,
        *,
        command: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> ResolvedMapping:
        """The mapping, fitted now unless it has been fitted before; arguments as in `fit_mapping`."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            if not self.done:
                fit_pairs(
                    self.options,
                    self.pairing,
                    self.texts,
                    self.pairs,
                    command=command,
                    progress=progress,
                    notice=notice,
                ).save(self.file)
        return self.mapping()

    def _shapes(self) -> dict[Pair, Parts]:
        d_in, d_out = self.pairing.source.info.d_model, self.pairing.target.info.d_model
        shapes: dict[str, tuple[int, ...]] = {"weight": (d_out, d_in), "bias": (d_out,)}
        if self.options.kind == "scale":
            shapes = {"scale": (1,)}
        elif self.options.rank is not None:
            rank = self.options.rank
            shapes = {"up": (d_out, rank), "down": (rank, d_in), "bias": (d_out,)}
        return {
            pair: {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            for pair in self.pairs
        }


def plan_fit(
    options: Fit,
    *,
    source: Model,
    target: Model,
    pairs: Sequence[Pair],
    sites: tuple[str, str],
    remote: bool | str = False,
    source_remote: bool | str | None = None,
    base: Path | None = None,
) -> PlannedFit | None:
    """What a run's fit will be, without fitting it.

    Args:
        options: The recipe's `fit`.
        source: M.
        target: M*.
        pairs: The (l, l*) of the run.
        sites: What of a block is read on each side.
        remote: Where M* runs.
        source_remote: Where M runs.
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
    data = DataSpec(**(options.data or DEFAULT_DATA))
    texts = read_texts(
        data,
        column=options.column,
        held_out=options.held_out,
        limit=options.limit,
        seed=options.seed,
        base=base,
    )
    pairing = Pairing(
        source=source,
        target=target,
        backend=backend_for(remote, source_remote),
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
    key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
    file = builtin.cache_folder() / "fits" / f"{options.kind}-{key}.safetensors"
    return PlannedFit(options=options, pairing=pairing, texts=texts, pairs=chosen, key=key, file=file)


def same_model(source: Model, target: Model) -> bool:
    """Whether two models are one: one object, or the same weights under one name."""
    return source is target or identity(source) == identity(target)


def identity(model: Model) -> list[Any]:
    """What tells a model from another: name, revision, dtype, and a sample of the weights that are here."""
    info = model.info
    digest = hashlib.sha256()
    if info.device != ELSEWHERE:
        for name, tensor in model.module.state_dict().items():
            step = max(1, tensor.numel() // _SAMPLED)
            sample = tensor.detach().flatten()[::step].float().cpu()
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return [info.name, info.revision, info.dtype, digest.hexdigest()[:16]]
