"""What is trained or differentiated through a model, by kind: from data to what is saved.

tuned_lens, jacobian_lens                           texts        a map from each layer to the last block
lre                                                 prompts      the same, of one relation
trained_scale, trained_scalar_affine,
trained_low_rank, trained_affine                    prompts      a map for each (l, l*)
soft_prompt                                         texts        a target prompt's embeddings
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patchscope_nn._util.arguments import checked
from patchscope_nn.data.given import as_data
from patchscope_nn.data.rows import fingerprint, load_rows
from patchscope_nn.errors import DataError, MappingError, did_you_mean
from patchscope_nn.fitting.trained.jacobian import fit_jacobian_lens
from patchscope_nn.fitting.trained.lre import fit_lre
from patchscope_nn.fitting.trained.outcome import Outcome, Progress
from patchscope_nn.fitting.trained.soft_prompt import FittedPrompt, fit_soft_prompt
from patchscope_nn.fitting.trained.through_text import KINDS, fit_through_text
from patchscope_nn.fitting.trained.tuned_lens import fit_tuned_lens
from patchscope_nn.mappings import Fitted, Provenance, Space
from patchscope_nn.models import Model
from patchscope_nn.proof import load
from patchscope_nn.spec.prompts import text_of

_TEXTS: dict[str, Callable[..., Outcome | FittedPrompt]] = {
    "tuned_lens": fit_tuned_lens,
    "jacobian_lens": fit_jacobian_lens,
    "soft_prompt": fit_soft_prompt,
}
TRAINED = (*_TEXTS, "lre", *KINDS)


@checked
def fit_trained(
    kind: str,
    *,
    model: Any,
    data: Any,
    column: str | None = None,
    target_model: Any = None,
    limit: int | None = None,
    base: Path | None = None,
    out: str | Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Fitted | FittedPrompt:
    """Fit one of the kinds that need gradients.

    Args:
        kind: One of `TRAINED`.
        model: M, whose states are read: what `load` takes.
        data: The texts or rows, as `run` takes data.
        column: The column of the texts, for the kinds that read texts; may be left out where there is one.
        target_model: M*, for the kinds that read a target prompt; None is M.
        limit: The most rows to read.
        base: The folder a relative file path starts from.
        out: A safetensors file to save to.
        command: The command line, for the provenance.
        progress: Called with (steps done, steps in all).
        **options: Those of the kind: see `fit_tuned_lens`, `fit_jacobian_lens`, `fit_lre`,
            `fit_through_text` and `fit_soft_prompt`.

    Returns:
        The mapping, or for `soft_prompt` the prompt; both have `save(file)`.

    Raises:
        InputError: Something given does not resolve, or does not fit the data.
    """
    if kind not in TRAINED:
        raise MappingError(f"{kind!r} is no kind that is trained.", hint=did_you_mean(kind, TRAINED))
    spec, rows = _rows(data, limit=limit, base=base)
    about = {"spec": spec, "fingerprint": fingerprint(rows), "limit": limit, "n_rows": len(rows)}
    source = load(model)
    target = source if target_model is None else load(target_model)
    options = options | {"progress": progress}
    if kind in _TEXTS:
        texts = texts_of(rows, column)
        about["column"] = column
        found = _TEXTS[kind](source, texts, **options)
    elif kind == "lre":
        found = fit_lre(source, rows, **options)
    else:
        found = fit_through_text(source, rows, kind=kind, target_model=target, **options)
    made: Fitted | FittedPrompt
    if isinstance(found, FittedPrompt):
        made = replace(found, about=replace(found.about, data=about, command=command))
    else:
        made = as_fitted(found, source=source, target=target, data=about, command=command)
    if out is not None:
        made.save(out)
    return made


def as_fitted(
    outcome: Outcome, *, source: Model, target: Model, data: Mapping[str, Any], command: str | None = None
) -> Fitted:
    """A fit as a mapping that a Patchscope takes, and that says where it comes from."""
    held_out = {}
    for score in outcome.held_out:
        numbers = asdict(score)
        held_out[numbers.pop("source_layer"), numbers.pop("target_layer")] = numbers
    settings = dict(outcome.provenance)
    seed = settings.get("seed", settings.get("training", {}).get("seed"))
    return Fitted(
        kind=outcome.kind,
        maps=outcome.maps,
        about=Provenance(
            source_model=Space.of(source.info),
            target_model=Space.of(target.info),
            data=data,
            settings=settings,
            held_out=held_out,
            seed=seed,
            command=command,
        ),
    )


def texts_of(rows: Sequence[Mapping[str, Any]], column: str | None) -> list[str]:
    """The texts of a column; where none is named, of the only one there is.

    Raises:
        DataError: There is no such column, or several and none is named.
    """
    columns = list(rows[0])
    if column is None and len(columns) == 1:
        column = columns[0]
    if column is None:
        raise DataError(
            f"the data has the columns {', '.join(columns)}, and none was named.",
            hint="Name the column of the texts (--column).",
        )
    if column not in columns:
        raise DataError(f"column={column!r} is no column of the data.", hint=did_you_mean(column, columns))
    return [text_of(row, column, field=f"data row {number}") for number, row in enumerate(rows)]


def _rows(data: Any, *, limit: int | None, base: Path | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the provenance says of where rows come from, and the rows."""
    data = as_data(data, limit=limit)
    said = {"rows": len(data.rows)} if data.rows is not None else data.model_dump(mode="json")
    return said, load_rows(data, base=base, limit=limit)
