"""Fit any trained kind: load the model and the data, fit, and record where the result comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from patchscope_nn._util.arguments import checked
from patchscope_nn.data.given import as_data
from patchscope_nn.data.rows import fingerprint, load_rows
from patchscope_nn.fitting.reporting import Progress
from patchscope_nn.fitting.texts import column_texts
from patchscope_nn.fitting.trained.kinds import trained_kind
from patchscope_nn.fitting.trained.outcome import FittedPrompt, Outcome
from patchscope_nn.mappings import Fitted, Provenance, Space
from patchscope_nn.proof import load


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
        model: M, whose states are read: anything `load` takes, or a loaded model.
        data: The texts or rows, as `run` takes data.
        column: The column of the texts, for kinds that read texts; not needed if there is only one column.
        target_model: M*, for kinds that read a target prompt; None is M.
        limit: The most rows to read.
        base: The folder that relative data files start from.
        out: A safetensors file to save to.
        command: The command line, for the provenance.
        progress: Called with (steps done, steps in total).
        **options: The options of the kind: see `fit_tuned_lens`, `fit_jacobian_lens`, `fit_lre`,
            `fit_through_text` and `fit_soft_prompt`.

    Returns:
        The mapping, or for `soft_prompt` the prompt; both have `save(file)`.

    Raises:
        InputError: The kind, the data or an option cannot be resolved, or they do not fit together.
    """
    trained = trained_kind(kind)
    spec = as_data(data, limit=limit)
    rows = load_rows(spec, base=base, limit=limit)
    named = {"rows": len(spec.rows)} if spec.rows is not None else spec.model_dump(mode="json")
    about = {"spec": named, "fingerprint": fingerprint(rows), "limit": limit, "n_rows": len(rows)}
    source = load(model)
    target = source if target_model is None else load(target_model)
    if trained.two_models:
        options["target_model"] = target
    texts: Sequence[Any] = rows
    if trained.reads == "texts":
        about["column"], texts = column, column_texts(rows, column)
    outcome = trained.fit(source, texts, progress=progress, **options)
    fitted: Fitted | FittedPrompt
    if isinstance(outcome, FittedPrompt):
        fitted = replace(outcome, about=replace(outcome.about, data=about, command=command))
    else:
        spaces = {"source_model": Space.of(source.info), "target_model": Space.of(target.info)}
        fitted = _as_fitted(outcome, data=about, command=command, **spaces)
    if out is not None:
        fitted.save(out)
    return fitted


def _as_fitted(outcome: Outcome, **about: Any) -> Fitted:
    """Add to an outcome where it comes from."""
    held_out = {}
    for score in outcome.held_out:
        numbers = asdict(score)
        held_out[numbers.pop("source_layer"), numbers.pop("target_layer")] = numbers
    settings = dict(outcome.provenance)
    seed = settings.get("seed", settings.get("training", {}).get("seed"))
    provenance = Provenance(settings=settings, held_out=held_out, seed=seed, **about)
    return Fitted(kind=outcome.kind, maps=outcome.maps, about=provenance)
