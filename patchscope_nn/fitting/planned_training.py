"""A training that a recipe asks for: planned and checked before the run, and then trained.

The maps are kept in `fits/KIND-REQUEST-WEIGHTS.safetensors`, where REQUEST is a digest of what was asked for
and WEIGHTS a digest of the weights it was trained through. If the weights are on a server, WEIGHTS is not
known and the file is found by REQUEST: a training made in this process serves a run on a server.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
from patchscope_nn.models import Model
from patchscope_nn.spec import Patchscope, Train

#: Raised if a training with the same options would give other maps than before.
_VERSION = 1


def plan_training(
    options: Train,
    *,
    scope: Patchscope,
    source: Model,
    target: Model,
    pairs: Sequence[Pair],
    sites: tuple[str, str],
    base: Path | None = None,
) -> Planned | None:
    """Plan and check a run's training of a Patchscope's mapping, without training it.

    The other arguments are those of `plan_fit`.

    Returns:
        The training; None if no pair has anything to learn, so that the mapping is the identity.

    Raises:
        LayerError: The kind has no map to one of the target layers.
        MappingError: The kind does not fit the Patchscope or the models.
        ModelError: The weights are on a server, and it was not trained in this process before.
        InputError: The data cannot be read, is too little, or does not fill a prompt.
    """
    chosen = tuple(sorted(set(pairs)))
    kind = mapping_kind(options.kind)
    request = Request(options=options, scope=scope, source=source, target=target, pairs=chosen, sites=sites)
    kind.check(request)
    if not any(map(kind.learns, chosen)):
        return None
    spec = DataSpec(**(options.data or DEFAULT_DATA))
    data = Rows(spec, kind.column(options), load_rows(spec, base=base, limit=options.limit))
    kind.check_data(request, data)
    file = _file(kind, request, data)
    name = f"train:{kind.name}"
    learned = kind.shapes(source.info.d_model)
    return Planned(
        name=name,
        doing=f"training {name}",
        unit=kind.unit,
        about={"kind": kind.name, "data": {"n_rows": len(data.rows)}},
        source=source,
        target=target,
        sites=sites,
        shapes={pair: learned if kind.learns(pair) else {"scale": (1,)} for pair in chosen},
        make=functools.partial(_train, kind, request, data, base),
        key=(key := file.stem.removeprefix(f"{kind.name}-")),
        decided_by=key,
        file=file,
    )


def _train(
    kind: MappingKind, request: Request, data: Rows, base: Path | None, *, notice: object, **reporting: Any
) -> Fitted:
    """Train it, without a notice, because its scores speak for themselves.

    Pairs for which there is nothing to learn get the identity, without a score.
    """
    del notice
    learned = [pair for pair in request.pairs if kind.learns(pair)]
    fitted = fit_trained(
        kind.name,
        model=request.source,
        target_model=request.target,
        data=data.spec,
        column=data.column,
        limit=request.options.limit,
        base=base,
        **reporting,
        **kind.arguments(request, [layer for layer, _ in learned]),
    )
    fitted = cast("Fitted", fitted)  # a MappingKind gives no prompt
    maps = {pair: {"scale": torch.ones(1)} for pair in request.pairs}
    maps |= {pair: fitted.parts(pair) for pair in learned}
    return Fitted(kind=fitted.kind, maps=maps, about=fitted.about)


def _file(kind: MappingKind, request: Request, data: Rows) -> Path:
    """The file a training is kept in."""
    models = (request.source, request.target)
    asked = digest(
        [
            _VERSION,
            request.options.model_dump(mode="json", exclude={"data", "column", "limit"}),
            [fingerprint(data.rows), data.column],
            [identity(model)[:2] for model in models],
            [list(pair) for pair in request.pairs],
            [side.model_dump(mode="json") for side in request.prompts] if kind.uses_prompts else None,
        ]
    )
    if away := [model for model in models if not model.info.weights_here]:
        return _trained_before(kind.name, asked, away[0])
    weights = digest([identity(model)[2:] for model in models])
    return folder() / f"{kind.name}-{asked}-{weights}.safetensors"


def _trained_before(kind: str, asked: str, model: Model) -> Path:
    """The one file of a training through a model whose weights are not in this process."""
    files = sorted(folder().glob(f"{kind}-{asked}-*.safetensors"))
    if len(files) == 1:
        return files[0]
    name = repr(model.info.name)
    if not files:
        raise ModelError(
            f"train.kind={kind} is trained through {name}, whose weights are not in this process.",
            hint="Run it once here, without --remote and with the engine transformers: the trained mapping "
            f"is kept, and found again. Or give a file that `patchscope fit {kind}` wrote elsewhere: "
            "mapping: {fitted: FILE}.",
        )
    raise ModelError(
        f"{len(files)} trainings of {kind} are kept for models named {name}, and it is not known which of "
        "them has the weights of this one.",
        hint=f"Name one, for example mapping: {{fitted: {files[-1]}}}.",
    )
