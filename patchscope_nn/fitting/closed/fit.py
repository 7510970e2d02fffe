"""Fits in closed form: read texts, stream their states, solve for the maps, score them on held-out texts.

Both models read each text, and their states at some random positions are the pairs (x, y) to fit. Different
tokenizers are aligned by character offsets. The maps are closed forms of sums over these pairs (`solve.py`),
so states are never held all at once. With one model and l* the last block, `affine` is the least-squares
"tuned lens" of the paper (section 4.1, after Din et al. 2023).
"""

from __future__ import annotations

import functools
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
from patchscope_nn.fitting.closed.states import Paired, Pairing
from patchscope_nn.fitting.closed.sums import Sums, size
from patchscope_nn.fitting.reporting import Notice, Progress
from patchscope_nn.fitting.texts import DEFAULT_DATA, Texts, read_texts
from patchscope_nn.mappings import Fitted, Pair, Provenance, Space
from patchscope_nn.proof import load
from patchscope_nn.spec import RESIDUAL, Fit, FitKind

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
    held_out: Any = None,
    sites: tuple[str, str] = (RESIDUAL.name, RESIDUAL.name),
    remote: bool | str = False,
    source_remote: bool | str | None = None,
    out: str | Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
    **options: Any,
) -> Fitted:
    """Fit maps from layers of one model to layers of another, or of itself, and score them.

    Args:
        kind: `affine`, `orthogonal`, `low_rank` or `scale`.
        model: M, whose states are mapped: anything `load` takes, or a loaded model.
        target_model: M*, to whose states they are mapped; None is M.
        pairs: `same`, `last`, `cross`, or pairs like `"3:5,4:6"`, as in `parse_pairs`.
        source_layers: The l of `same`, `last` and `cross`.
        target_layers: The l* of `cross`.
        data: The texts, as `run` takes data; None uses texts that ship with this package.
        held_out: The share of the texts to hold out, or separate data; None takes the share of `Fit`.
        sites: The name of the site that is read on each side.
        remote: Where the target runs, as in `run`; states are sent back as values.
        source_remote: Where the source runs; None is the same place as the target.
        out: A safetensors file to save to.
        command: The command line, for the provenance.
        progress: Called with (texts done, texts in total).
        notice: Called with a sentence if the fit may be unreliable.
        **options: The other fields of `Fit`, for example `rank`, `positions`, `limit` and `seed`.

    Returns:
        The maps; `about.held_out` has the scores of each pair.

    Raises:
        InputError: The data or layers cannot be resolved, or the kind does not fit the two spaces.
    """
    places = Places.of(remote, source_remote)
    source = load(model, **places.loading("source", model))
    target = source if target_model is None else load(target_model, **places.loading("target", target_model))
    fit, data, separate = _resolve(kind, data, held_out, options)
    one = target is source and sites[0] == sites[1]
    layers = {"source_layers": source_layers, "target_layers": target_layers}
    sizes = {"n_source": source.info.n_layers, "n_target": target.info.n_layers}
    chosen = parse_pairs(pairs, one_model=one, **layers, **sizes)
    texts = texts_for(fit, data, held_out=separate)
    pairing = Pairing(source=source, target=target, backend=places.backend, sites=sites, options=fit)
    fitted = fit_pairs(fit, pairing, texts, chosen, command=command, progress=progress, notice=notice)
    if out is not None:
        fitted.save(out)
    return fitted


def _resolve(
    kind: FitKind, data: Any, held_out: Any, options: dict[str, Any]
) -> tuple[Fit, DataSpec, DataSpec | None]:
    """The settings of a fit, its data, and the separate data to hold out."""
    spec = None if data is None else as_data(data, limit=options.get("limit"))
    separate = None
    if isinstance(held_out, int | float):
        options = {**options, "held_out": held_out}
    elif held_out is not None:
        separate = as_data(held_out)
    fit = Fit(kind=kind, data=None if spec is None else spec.model_dump(mode="json"), **options)
    return fit, spec or as_data(DEFAULT_DATA), separate


def texts_for(
    options: Fit, data: DataSpec, *, held_out: DataSpec | None = None, base: Path | None = None
) -> Texts:
    """Read and split the texts of a fit; arguments and errors as in `read_texts`."""
    return read_texts(
        data,
        held_out=held_out or options.held_out,
        base=base,
        **options.model_dump(include={"column", "limit", "seed"}),
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
    """Fit and score the maps of some pairs, at least one of which is not an identity.

    The map of a layer of one model to itself is the identity and has no score.

    Raises:
        DataError: No text has a position that both models read.
        InputError: The kind does not fit the two spaces.
    """
    solutions = {pair: identity() for pair in pairs if pairing.is_identity(pair)}
    pairs = [pair for pair in pairs if pair not in solutions]
    d_in, d_out = pairing.widths
    chunks = list(_chunks(pairs, d_in, d_out))
    total = len(chunks) * (len(texts.fitted) + len(texts.choosing)) + len(texts.held_out)
    read = functools.partial(_read, pairing, _counter(progress, total))
    for chunk in chunks:
        centres: dict[tuple[str, int], Any] = {}
        fitted, choosing = Sums(chunk, centres), Sums(chunk, centres)
        for states in read(texts.fitted, chunk, name="to fit on"):
            fitted.add(states.source, states.target)
        for states in read(texts.choosing, chunk, name="to choose settings by"):
            choosing.add(states.source, states.target)
        solutions |= {pair: solve(options, fitted, choosing, pair) for pair in chunk}
    scores = Scores({pair: solutions[pair] for pair in pairs})
    for states in read(texts.held_out, pairs, name="held out"):
        scores.add(states)
    if notice:
        for sentence in _notices(options, scores.solutions, d_in):
            notice(sentence)
    n_positions = {"fitted_on": solutions[pairs[0]].n, "held_out": scores.n}
    settings = options.model_dump(mode="json", exclude={"data", "seed"}) | {"skip": pairing.skip}
    chosen = [[*pair, solution.settings] for pair, solution in sorted(solutions.items())]
    about = Provenance(
        source_model=Space.of(pairing.source.info, site=pairing.sites[0]),
        target_model=Space.of(pairing.target.info, site=pairing.sites[1]),
        data={part: {**texts.about[part], "n_positions": n} for part, n in n_positions.items()},
        settings={**settings, "pairs": chosen},
        held_out=scores.numbers(),
        seed=options.seed,
        command=command,
    )
    maps = {pair: solution.parts for pair, solution in solutions.items()}
    return Fitted(kind=options.kind, maps=maps, about=about)


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Return a function that reports how many texts are done, when told that some more are."""
    done = 0

    def count(texts: int) -> None:
        nonlocal done
        done += texts
        if progress:
            progress(done, total)

    return count


def _read(
    pairing: Pairing, count: Callable[[int], None], texts: Sequence[str], pairs: Sequence[Pair], *, name: str
) -> Iterator[Paired]:
    """Yield the paired states of some texts, which must have some."""
    empty = True
    for states in pairing.stream(texts, pairs):
        if states.source:
            empty = False
            yield states
        count(states.texts)
    if empty:
        raise DataError(
            f"the texts {name} have no position that both models read: they are too short, or no token of "
            "one model ends where a token of the other does.",
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
