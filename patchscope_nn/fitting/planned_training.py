"""A training that a recipe asks for: planned and checked before the run, and then trained.

The maps are kept in `fits/KIND-REQUEST-WEIGHTS.safetensors`, where REQUEST is a digest of what was asked for
and WEIGHTS a digest of the weights it was trained through. If the weights are on a server, WEIGHTS is not
known and the file is found by REQUEST: a training made in this process serves a run on a server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from patchscope_nn._util.digests import digest
from patchscope_nn.data.rows import DataSpec, fingerprint, load_rows
from patchscope_nn.errors import ModelError
from patchscope_nn.fitting.planned import Planned, folder, identity
from patchscope_nn.fitting.texts import DEFAULT_DATA
from patchscope_nn.fitting.trained.fit import fit_trained
from patchscope_nn.fitting.trained.kind import MappingKind, Request, Rows
from patchscope_nn.fitting.trained.kinds import mapping_kind
from patchscope_nn.mappings import Fitted, Pair
from patchscope_nn.models import ELSEWHERE, Model
from patchscope_nn.spec import Patchscope, Train

#: Raised if a training with the same options would give other maps than before.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PlannedTraining(Planned):
    """A training that a run needs.

    Attributes:
        kind: The kind that is trained.
        request: What the recipe asks for.
        data: What it is trained on.
        base: The folder that relative data files start from.
    """

    kind: MappingKind
    request: Request
    data: Rows
    base: Path | None

    @property
    def name(self) -> str:
        """As in `Planned`."""
        return f"train:{self.kind.name}"

    @property
    def doing(self) -> str:
        """As in `Planned`."""
        return f"training {self.name}"

    @property
    def unit(self) -> str:
        """As in `Planned`."""
        return self.kind.unit

    @property
    def about(self) -> dict[str, Any]:
        """As in `Planned`: the kind, and the number of rows it reads."""
        return {"kind": self.kind.name, "data": {"n_rows": len(self.data.rows)}}

    def shapes(self, pair: Pair) -> dict[str, tuple[int, ...]]:
        """As in `Planned`."""
        return self.kind.shapes(self.source.info.d_model) if self.kind.learns(pair) else {"scale": (1,)}

    def make(
        self,
        *,
        command: str | None,
        progress: Callable[[int, int], None] | None,
        notice: Callable[[str], None] | None,  # noqa: ARG002 (its scores speak for themselves)
    ) -> Fitted:
        """As in `Planned`; pairs for which there is nothing to learn get the identity, without a score."""
        learned = [pair for pair in self.pairs if self.kind.learns(pair)]
        fitted = fit_trained(
            self.kind.name,
            model=self.source,
            target_model=self.target,
            data=self.data.spec,
            column=self.data.column,
            limit=self.request.options.limit,
            base=self.base,
            command=command,
            progress=progress,
            **self.kind.arguments(self.request, [layer for layer, _ in learned]),
        )
        fitted = cast("Fitted", fitted)  # a MappingKind gives no prompt
        maps = {pair: {"scale": torch.ones(1)} for pair in self.pairs}
        maps |= {pair: fitted.parts(pair) for pair in learned}
        return Fitted(kind=fitted.kind, maps=maps, about=fitted.about)


def plan_training(
    options: Train,
    *,
    scope: Patchscope,
    source: Model,
    target: Model,
    pairs: Sequence[Pair],
    sites: tuple[str, str],
    base: Path | None = None,
) -> PlannedTraining | None:
    """Plan and check a run's training, without training it.

    Args:
        options: The recipe's `train`.
        scope: The Patchscope.
        source: M.
        target: M*.
        pairs: The (l, l*) of the run.
        sites: The names of the sites that are read and written.
        base: The folder that relative data files start from.

    Returns:
        The training; None if no pair has anything to learn, so that the mapping is the identity.

    Raises:
        LayerError: The kind has no map to one of the target layers.
        MappingError: The kind does not fit the Patchscope or the models.
        ModelError: The weights are on a server, and it was not trained in this process before.
        InputError: The data cannot be read, is too little, or does not fill a prompt.
    """
    away = any(model.info.device == ELSEWHERE for model in (source, target))
    chosen = tuple(sorted(set(pairs)))
    kind = mapping_kind(options.kind)
    request = Request(options=options, scope=scope, source=source, target=target, pairs=chosen, sites=sites)
    kind.check(request, away=away)
    if not any(map(kind.learns, chosen)):
        return None
    spec = DataSpec(**(options.data or DEFAULT_DATA))
    data = Rows(spec, kind.column(options), load_rows(spec, base=base, limit=options.limit))
    kind.check_data(request, data)
    asked = digest(
        [
            _VERSION,
            options.model_dump(mode="json", exclude={"data", "column", "limit"}),
            [fingerprint(data.rows), data.column],
            [identity(model)[:2] for model in (source, target)],
            [list(pair) for pair in chosen],
            [side.model_dump(mode="json") for side in request.prompts()] if kind.uses_prompts else None,
        ]
    )
    weights = digest([identity(model)[2:] for model in (source, target)])
    file = folder() / f"{kind.name}-{asked}-{weights}.safetensors"
    if away:
        file = _trained_before(kind.name, asked, source if source.info.device == ELSEWHERE else target)
    return PlannedTraining(
        kind=kind,
        request=request,
        data=data,
        base=base,
        source=source,
        target=target,
        sites=sites,
        pairs=chosen,
        key=file.stem.removeprefix(f"{kind.name}-"),
        file=file,
    )


def _trained_before(kind: str, asked: str, model: Model) -> Path:
    """The file of a training through a model whose weights are on a server.

    Raises:
        ModelError: There is none, or there are several, for models of one name.
    """
    files = sorted(folder().glob(f"{kind}-{asked}-*.safetensors"))
    if len(files) == 1:
        return files[0]
    name = repr(model.info.name)
    if not files:
        raise ModelError(
            f"train.kind={kind} is trained through {name}, whose weights are on a server.",
            hint="Run it once here, without --remote: the trained mapping is kept, and found again. Or give "
            f"a file that `patchscope fit {kind}` wrote elsewhere: mapping: {{fitted: FILE}}.",
        )
    raise ModelError(
        f"{len(files)} trainings of {kind} are kept for models named {name}, and it is not known which of "
        "them has the weights of the server's.",
        hint=f"Name one, for example mapping: {{fitted: {files[-1]}}}.",
    )
