"""What a recipe asks to be trained through its model, before the run: planned, checked, and then trained.

The maps are kept in `fits/KIND-ASKED-WEIGHTS.safetensors`: a digest of what was asked, and one of the weights
that it was trained through. Where the weights are on a server the second cannot be told, and the file is
found by the first: what was trained here serves a run there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from patchscope_nn._util.digests import digest
from patchscope_nn.data.rows import DataSpec, fingerprint, load_rows
from patchscope_nn.errors import LayerError, MappingError, ModelError
from patchscope_nn.fitting.planned import Planned, folder, identity, same_model
from patchscope_nn.fitting.texts import DEFAULT_COLUMN, DEFAULT_DATA
from patchscope_nn.fitting.trained.examples import make_examples
from patchscope_nn.fitting.trained.fit import fit_trained, texts_of
from patchscope_nn.fitting.trained.held_out import deal, deal_texts
from patchscope_nn.fitting.trained.jacobian import SKIP_FIRST
from patchscope_nn.fitting.trained.lre import SUBJECTS, check_subjects, find_subject
from patchscope_nn.fitting.trained.through_text import KINDS, find_pairs
from patchscope_nn.fitting.trained.training import Training
from patchscope_nn.mappings import Fitted, Pair
from patchscope_nn.models import ELSEWHERE, Model
from patchscope_nn.spec import LENS_KINDS, RESIDUAL, Patchscope, Source, Target, Train
from patchscope_nn.spec.layers import EMBED

#: Raised where a training of the same options would give other maps than before.
_VERSION = 1
#: How many tokens of a text the lenses read, and leave out, where a recipe does not say.
_MAX_TOKENS = 128
_SKIPPED = {"tuned_lens": 1, "jacobian_lens": SKIP_FIRST}


class _Data(NamedTuple):
    """What is trained on."""

    spec: DataSpec
    column: str | None
    rows: list[dict[str, Any]]
    base: Path | None


@dataclass(frozen=True, kw_only=True)
class PlannedTraining(Planned):
    """A training that a run needs.

    Attributes:
        options: What decides it.
        scope: The Patchscope, whose S and T the `trained_` kinds are trained with.
        data: What it is trained on.
    """

    options: Train
    scope: Patchscope
    data: _Data

    @property
    def name(self) -> str:
        """How tables and manifests call it."""
        return f"train:{self.options.kind}"

    @property
    def doing(self) -> str:
        """What its progress says is being done."""
        return f"training {self.name}"

    @property
    def unit(self) -> str:
        """What its progress counts: texts, subjects, or steps of the optimiser."""
        return {"jacobian_lens": "texts", "lre": "subjects"}.get(self.options.kind, "steps")

    @property
    def about(self) -> dict[str, Any]:
        """Its kind, and how many rows it reads."""
        return {"kind": self.options.kind, "data": {"n_rows": len(self.data.rows)}}

    def shapes(self, pair: Pair) -> dict[str, tuple[int, ...]]:
        """The shapes of a pair's tensors, by name."""
        size, kind = self.source.info.d_model, self.options.kind
        if self._is_one(pair):
            return {"scale": (1,)}
        first: dict[str, tuple[int, ...]] = {"weight": (size, size)}
        if kind in ("trained_scale", "trained_scalar_affine"):
            first = {"scale": (1,)}
        return first if kind in ("trained_scale", "jacobian_lens") else first | {"bias": (size,)}

    def make(
        self,
        *,
        command: str | None,
        progress: Callable[[int, int], None] | None,
        notice: Callable[[str], None] | None,  # noqa: ARG002 (its numbers speak for themselves)
    ) -> Fitted:
        """Train the maps; of the last block to itself it is identity, and no number is reported of it."""
        learned = [pair for pair in self.pairs if not self._is_one(pair)]
        made = fit_trained(
            self.options.kind,
            model=self.source,
            target_model=self.target,
            data=self.data.spec,
            column=self.data.column,
            limit=self.options.limit,
            base=self.data.base,
            command=command,
            progress=progress,
            **self._given([layer for layer, _ in learned]),
        )
        found = cast("Fitted", made)  # what gives a prompt is no kind of a Train
        maps = {pair: found.parts(pair) for pair in learned}
        maps |= {pair: {"scale": torch.ones(1)} for pair in self.pairs if self._is_one(pair)}
        return Fitted(kind=found.kind, maps=maps, about=found.about)

    def _given(self, layers: Sequence[int]) -> dict[str, Any]:
        """The options of its kind, as the kind's own function takes them."""
        kind, given = self.options.kind, self.options.options
        if kind in KINDS:
            source, target = sides(self.scope)
            own: dict[str, Any] = {"source": source, "target": target}
        else:
            own = {"layers": ["embed" if layer == EMBED else layer for layer in layers]}
        if kind in ("jacobian_lens", "lre"):
            return (
                own
                | {name: one for name, one in given.items() if name != "column"}
                | {"seed": self.options.seed}
            )
        training = training_of(self.options)
        others = given.keys() - Training.model_fields.keys() - {"column"}
        return own | {name: given[name] for name in others} | {"training": training}

    def _is_one(self, pair: Pair) -> bool:
        return _is_one(self.options, pair)


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
    """What a run's training will be, without training it.

    Args:
        options: The recipe's `train`.
        scope: The Patchscope.
        source: M.
        target: M*.
        pairs: The (l, l*) of the run.
        sites: The name of the site that is read on each side.
        base: The folder that relative data files start from.

    Returns:
        The training; None where every pair is the last block and itself, for which a lens is identity.

    Raises:
        LayerError: A map to the last block is asked for, and l* is another.
        MappingError: The kind does not fit the Patchscope or the models.
        ModelError: The weights are on a server, and it was not trained here before.
        InputError: The data cannot be read, is too little, or does not fill a prompt.
    """
    away = any(model.info.device == ELSEWHERE for model in (source, target))
    chosen = tuple(sorted(set(pairs)))
    if options.kind in KINDS:
        _check_sides(options, scope, source, target)
    else:
        _check_lens(options, source, target, chosen, sites, away=away)
    if all(_is_one(options, pair) for pair in chosen):
        return None
    data = _read(options, base)
    _check_data(options, data, scope, source=source, target=target)
    said = [
        _VERSION,
        options.model_dump(mode="json", exclude={"data", "column", "limit"}),
        [fingerprint(data.rows), data.column],
        [identity(model)[:2] for model in (source, target)],
        [list(pair) for pair in chosen],
        [one.model_dump(mode="json") for one in sides(scope)] if options.kind in KINDS else None,
    ]
    asked, weights = digest(said), digest([identity(model)[2:] for model in (source, target)])
    file = folder() / f"{options.kind}-{asked}-{weights}.safetensors"
    if away:
        file = _made_here(options, asked, source if source.info.device == ELSEWHERE else target)
    return PlannedTraining(
        options=options,
        scope=scope,
        data=data,
        source=source,
        target=target,
        sites=sites,
        pairs=chosen,
        key=file.stem.removeprefix(f"{options.kind}-"),
        file=file,
    )


def sides(scope: Patchscope) -> tuple[Source, Target]:
    """S and T as a training takes them, which is given the models themselves."""
    return (
        scope.source.model_copy(update={"model": None}),
        scope.target.model_copy(update={"model": None}),
    )


def training_of(options: Train) -> Training:
    """How it is trained: the kind's own way, with what the recipe says otherwise."""
    names = ("steps", "batch", "learning_rate", "held_out")
    given = {name: value for name, value in options.options.items() if name in names}
    own = {"learning_rate": KINDS[options.kind][1], "batch": 16} if options.kind in KINDS else {}
    return Training(**own | given, seed=options.seed)


def _is_one(options: Train, pair: Pair) -> bool:
    """Whether a lens has nothing to learn of a pair."""
    return options.kind in LENS_KINDS and pair[0] == pair[1]


def _check_sides(options: Train, scope: Patchscope, source: Model, target: Model) -> None:
    find_pairs(source, target, source=sides(scope)[0], target=sides(scope)[1])
    size, other = source.info.d_model, target.info.d_model
    if size != other or (options.rank or 1) > size:
        raise MappingError(
            f"{options.kind} starts as the identity, and the states have {size} numbers and {other}"
            + (f"; its rank is {options.rank}." if options.rank else "."),
            hint="Train between models of one d_model, with a rank of at most that; else {fit: affine}.",
        )


def _check_lens(
    options: Train,
    source: Model,
    target: Model,
    pairs: Sequence[Pair],
    sites: tuple[str, str],
    *,
    away: bool,
) -> None:
    one = same_model(source, target) or (away and identity(source)[:2] == identity(target)[:2])
    if not one or {*sites} != {RESIDUAL.name}:
        given = f"sites {' and '.join(sites)}" if one else f"{source.info.name} and {target.info.name}"
        raise MappingError(
            f"train.kind={options.kind} maps outputs of a model's blocks to its own last block; this run has "
            f"{given}.",
            hint=f"Take one model and site: {RESIDUAL.name} on both sides; between two models use "
            "{fit: affine}.",
        )
    last = target.info.n_layers - 1
    if beyond := sorted({layer for _, layer in pairs} - {last}):
        raise LayerError(
            f"train.kind={options.kind} maps to the last block, which is {last}; this run writes at layer "
            f"{', '.join(map(str, beyond[:5]))}{', ...' * (len(beyond) > 5)}.",  # noqa: PLR2004 (shown)
            hint="Write target.layer: -1.",
        )


def _read(options: Train, base: Path | None) -> _Data:
    spec = DataSpec(**(options.data or DEFAULT_DATA))
    column = options.column
    if options.kind in LENS_KINDS and column is None and options.data in (None, dict(DEFAULT_DATA)):
        column = DEFAULT_COLUMN
    return _Data(spec, column, load_rows(spec, base=base, limit=options.limit), base)


def _check_data(options: Train, data: _Data, scope: Patchscope, *, source: Model, target: Model) -> None:
    """Find what is wrong with the data before anything runs: columns, prompts, positions, and how many."""
    given = options.options
    training = training_of(options)
    if options.kind in LENS_KINDS:
        skip = given.get("skip_first", _SKIPPED[options.kind])
        deal_texts(
            texts_of(data.rows, data.column),
            source.tokenizer,
            held_out=training.held_out,
            seed=options.seed,
            stopping=training.stopping if options.kind == "tuned_lens" else 0.0,
            max_tokens=given.get("max_tokens", _MAX_TOKENS),
            least=skip + (1 if options.kind == "tuned_lens" else 2),
        )
    elif options.kind == "lre":
        found = {
            find_subject(source, row, prompt=given["prompt"], subject=given["subject"]) for row in data.rows
        }
        check_subjects(len(found), given.get("subjects", SUBJECTS))
    else:
        one, other = sides(scope)
        examples = make_examples(
            data.rows, model=source, to=target, source=one, target=other, text=given["text"]
        )
        deal(
            [example.source for example in examples],
            held_out=training.held_out,
            seed=options.seed,
            stopping=training.stopping,
            what="source prompts",
        )


def _made_here(options: Train, asked: str, model: Model) -> Path:
    """The file of a training whose weights are on a server now.

    Raises:
        ModelError: There is none; or there are several, of models of one name.
    """
    files = sorted(folder().glob(f"{options.kind}-{asked}-*.safetensors"))
    if len(files) == 1:
        return files[0]
    name = repr(model.info.name)
    if not files:
        raise ModelError(
            f"train.kind={options.kind} is trained through {name}, whose weights are on a server.",
            hint="Run it once here, without --remote: what is trained is kept, and found again. Or give what "
            f"`patchscope fit {options.kind}` wrote elsewhere: mapping: {{fitted: FILE}}.",
        )
    raise ModelError(
        f"{len(files)} trainings of {options.kind} are kept for models of the name {name}, and which has the "
        "weights of the server's cannot be told.",
        hint=f"Name one, for example mapping: {{fitted: {files[-1]}}}.",
    )
