"""Fits in closed form: read texts, stream their states, solve for the maps, score them on held-out texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from patchscope_nn._util.arguments import checked
from patchscope_nn.backends import Places
from patchscope_nn.data.given import as_data
from patchscope_nn.data.rows import DataSpec
from patchscope_nn.errors import DataError
from patchscope_nn.fitting.closed.pairs import parse_pairs
from patchscope_nn.fitting.closed.score import Scores
from patchscope_nn.fitting.closed.solve import Solution, identity, solve
from patchscope_nn.fitting.closed.states import Pairing
from patchscope_nn.fitting.closed.sums import Sums, size
from patchscope_nn.fitting.texts import DEFAULT_DATA, Texts, read_texts
from patchscope_nn.mappings import Fitted, Pair, Provenance, Space
from patchscope_nn.proof import load
from patchscope_nn.spec import RESIDUAL, Fit, FitKind

Progress = Callable[[int, int], None]
Notice = Callable[[str], None]
#: The most bytes that sums may take at a time; the remaining pairs are fitted in another pass over the texts.
_MEMORY = 2 << 30
#: A notice is given if there are fewer states per dimension than this.
_ENOUGH = 2


@checked
def fit_mapping(
    kind: FitKind = "affine",
    *,
    model: Any,
    target_model: Any = None,
    pairs: str | Sequence[Any] = "same",
    source_layers: Any = "all",
    target_layers: Any = "all",
    data: Any = None,
    held_out: Any = 0.2,
    sites: tuple[str, str] = (RESIDUAL.name, RESIDUAL.name),
    remote: bool | str = False,
    source_remote: bool | str | None = None,
    base: Path | None = None,
    out: str | Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
    **options: Any,
) -> Fitted:
    """Fit maps from layers of one model to layers of another, or of itself, and score them.

    Both models read each text, and their states at some random positions are the pairs (x, y) to fit.
    Different tokenizers are aligned by character offsets. The maps are closed forms of sums over these pairs
    (see `solve.py`); states are streamed and never held all at once. With one model and l* the last block,
    `affine` is the least-squares "tuned lens" of the paper (section 4.1, after Din et al. 2023).

    Args:
        kind: `affine`, `orthogonal`, `low_rank` or `scale`.
        model: M, whose states are mapped: anything `load` takes, or a loaded model.
        target_model: M*, to whose states they are mapped; None is M.
        pairs: `same`, `last`, `cross`, or pairs like `"3:5,4:6"`, as in `parse_pairs`.
        source_layers: The l of `same`, `last` and `cross`.
        target_layers: The l* of `cross`.
        data: The texts, as `run` takes data; None uses texts that ship with this package.
        held_out: The share of the texts to hold out, or separate data.
        sites: The name of the site that is read on each side.
        remote: Where the target runs, as in `run`; states are sent back as values.
        source_remote: Where the source runs; None is the same place as the target.
        base: The folder that relative data files start from.
        out: A safetensors file to save to.
        command: The command line, for the provenance.
        progress: Called with (texts done, texts in total).
        notice: Called with a sentence if the fit may be unreliable.
        **options: The other fields of `Fit`: `column`, `limit`, `positions`, `max_tokens`, `rank`, `lambdas`
            and `seed`.

    Returns:
        The maps; `about.held_out` has the scores of each pair.

    Raises:
        InputError: The data or layers cannot be resolved, or the kind does not fit the two spaces.
    """
    places = Places.of(remote, source_remote)
    source = load(model, **places.loading(places.source))
    target = source if target_model is None else load(target_model, **places.loading(places.target))
    if isinstance(held_out, int | float):
        options = {**options, "held_out": held_out}
    spec = None if data is None else as_data(data, limit=options.get("limit"))
    fit = Fit(kind=kind, data=None if spec is None else spec.model_dump(mode="json"), **options)
    chosen = parse_pairs(
        pairs,
        n_source=source.info.n_layers,
        n_target=target.info.n_layers,
        source_layers=source_layers,
        target_layers=target_layers,
        one_model=target is source and sites[0] == sites[1],
    )
    separate = None if isinstance(held_out, int | float) else as_data(held_out)
    texts = texts_for(fit, spec or as_data(DEFAULT_DATA), held_out=separate, base=base)
    pairing = Pairing(
        source=source,
        target=target,
        backend=places.backend,
        sites=sites,
        options=fit,
    )
    fitted = fit_pairs(fit, pairing, texts, chosen, command=command, progress=progress, notice=notice)
    if out is not None:
        fitted.save(out)
    return fitted


def texts_for(
    options: Fit, data: DataSpec, *, held_out: DataSpec | None = None, base: Path | None = None
) -> Texts:
    """Read the texts of a fit; a share of them or separate data is held out.

    Raises:
        InputError: The data cannot be read, or is too little.
    """
    return read_texts(
        data,
        column=options.column,
        held_out=held_out or options.held_out,
        limit=options.limit,
        seed=options.seed,
        base=base,
    )


def fit_pairs(
    options: Fit,
    pairing: Pairing,
    texts: Texts,
    pairs: Sequence[Pair],
    *,
    command: str | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> Fitted:
    """Fit and score the maps of some pairs.

    The map of a layer of one model to itself is the identity and has no score.

    Args:
        options: The kind and its settings.
        pairing: Reads the states.
        texts: The texts, already split.
        pairs: The pairs (l, l*); at least one is not an identity.
        command: As in `fit_mapping`.
        progress: As in `fit_mapping`.
        notice: As in `fit_mapping`.

    Raises:
        DataError: No text has a position that both models read.
        InputError: The kind does not fit the two spaces.
    """
    source, target = pairing.source.info, pairing.target.info
    solutions = {pair: identity() for pair in pairs if pairing.is_identity(pair)}
    pairs = [pair for pair in pairs if pair not in solutions]
    d_in, d_out = pairing.widths
    chunks = list(_chunks(pairs, d_in, d_out))
    per_chunk = len(texts.fitted) + len(texts.choosing)
    count = _Count(progress, len(chunks) * per_chunk + len(texts.held_out))
    for chunk in chunks:
        about: dict[tuple[str, int], Any] = {}
        sums = [
            _summed(pairing, part, Sums(chunk, about), count, name)
            for part, name in ((texts.fitted, "to fit on"), (texts.choosing, "to choose settings by"))
        ]
        solutions |= {pair: solve(options, sums[0], sums[1], pair) for pair in chunk}
    scores = Scores({pair: solutions[pair] for pair in pairs})
    for states in pairing.stream(texts.held_out, pairs):
        if states.source:
            scores.add(states)
        count(states.texts)
    if not scores.n:
        raise _no_positions("held out")
    if notice:
        for sentence in _notices(options, scores.solutions, d_in):
            notice(sentence)
    n = solutions[pairs[0]].n
    return Fitted(
        kind=options.kind,
        maps={pair: solution.parts for pair, solution in solutions.items()},
        about=Provenance(
            source_model=Space.of(source, site=pairing.sites[0]),
            target_model=Space.of(target, site=pairing.sites[1]),
            data={
                "fitted_on": {**texts.about["fitted_on"], "n_positions": n},
                "held_out": {**texts.about["held_out"], "n_positions": scores.n},
            },
            settings={
                **options.model_dump(mode="json", exclude={"data", "seed"}),
                "skip": pairing.skip,
                "pairs": [[*pair, solution.settings] for pair, solution in sorted(solutions.items())],
            },
            held_out=scores.numbers(),
            seed=options.seed,
            command=command,
        ),
    )


class _Count:
    """Counts the texts that have been read, and reports the count."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, texts: int) -> None:
        self.done += texts
        if self.progress:
            self.progress(self.done, self.total)


def _summed(pairing: Pairing, texts: Sequence[str], sums: Sums, count: _Count, name: str) -> Sums:
    for states in pairing.stream(texts, sums.pairs):
        if states.source:
            sums.add(states.source, states.target)
        count(states.texts)
    if not sums.n:
        raise _no_positions(name)
    return sums


def _no_positions(name: str) -> DataError:
    return DataError(
        f"the texts {name} have no position that both models read: they are too short, or no token of one "
        "model ends where a token of the other does.",
        hint="Give more and longer texts.",
    )


def _chunks(pairs: Sequence[Pair], d_in: int, d_out: int) -> Iterator[list[Pair]]:
    """Split the pairs into groups whose sums fit into memory together."""
    chunk: list[Pair] = []
    for pair in sorted(pairs):
        if chunk and 3 * size([*chunk, pair], d_in, d_out) > _MEMORY:
            yield chunk
            chunk = []
        chunk.append(pair)
    yield chunk


def _notices(options: Fit, solutions: Mapping[Pair, Solution], d_in: int) -> Iterator[str]:
    n = next(iter(solutions.values())).n
    if options.kind != "scale" and n < _ENOUGH * d_in:
        yield (
            f"fitted on {n} positions, for states of {d_in} dimensions: the maps may be unreliable. Give "
            "more texts, or more positions of each."
        )
    ends = [pair for pair, solution in solutions.items() if solution.settings.get("at_end_of_grid")]
    if ends:
        setting = "alpha" if options.kind == "scale" else "lambda"
        yield f"{setting} is at an end of its grid for {len(ends)} of {len(solutions)} pairs."
