"""Results as a table: one tidy row for a cell, with the columns of every run in one order.

The control is null for the real cell. Layers and positions are resolved: blocks from 0 (-1 is the input of
block 0), positions from the left, as lists, since several tokens may be patched together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from patchscope_nn.cells import Cell, Sweep
from patchscope_nn.metrics import MetricUse, compute_metrics
from patchscope_nn.spec import Choices, Generate, Hidden, NextToken, Readout

PLACES = (
    "row",
    "control",
    "source_prompt",
    "source_position",
    "source_token",
    "source_layer",
    "target_prompt",
    "target_position",
    "target_token",
    "target_layer",
    "source_model",
    "target_model",
    "mapping",
)
#: The columns each readout gives, in order.
READINGS: dict[type[Readout], tuple[str, ...]] = {
    NextToken: (
        "top_tokens",
        "top_ids",
        "top_probs",
        "entropy_nats",
        "reference_tokens",
        "reference_ids",
        "reference_logprobs",
        "reference_ranks",
        "surprisal_nats",
        "nll_nats",
    ),
    Generate: ("text", "stopped"),
    Choices: ("choices", "choice_logprobs", "choice_probs", "choice"),
    Hidden: ("hidden",),
}


def columns_of(readout: Readout, uses: Sequence[MetricUse]) -> list[str]:
    """The names of a run's columns, in order."""
    readings = READINGS[type(readout)]
    metrics = [use.name for use in uses if use.name not in readings]
    return [*PLACES, *readings, *metrics, "error"]


def table_row(
    sweep: Sweep,
    cell: Cell,
    raw: Mapping[str, Any],
    *,
    tokenizer: Any,
    mapping: str,
    uses: Sequence[MetricUse],
) -> dict[str, Any]:
    """One cell's row.

    Args:
        sweep: The sweep.
        cell: The cell.
        raw: What its readout gave inside the context.
        tokenizer: The target model's.
        mapping: The mapping's name.
        uses: The metrics.

    Returns:
        The columns of `columns_of`, by name.
    """
    source = None if cell.source_prompt is None else sweep.source_prompts[cell.source_prompt]
    read = cell.source_positions
    target = sweep.target_prompts[cell.target_prompt]
    readings = _readings(sweep, cell, raw, tokenizer)
    metrics = compute_metrics(uses, readings, sweep.rows[cell.row])
    return {
        "row": cell.row,
        "control": cell.control,
        "source_prompt": None if source is None else source.text,
        "source_position": None if read is None else list(read),
        "source_token": None if source is None or read is None else [source.tokens[at] for at in read],
        "source_layer": cell.source_layer,
        "target_prompt": target.text,
        "target_position": list(cell.target_positions),
        "target_token": [target.tokens[at] for at in cell.target_positions],
        "target_layer": cell.target_layer,
        "source_model": sweep.source.name,
        "target_model": sweep.target.name,
        "mapping": mapping,
        **readings,
        **metrics,
        "error": None,
    }


def _readings(sweep: Sweep, cell: Cell, raw: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    readout = sweep.scope.readout
    if isinstance(readout, NextToken):
        named = {
            "top_tokens": _texts(tokenizer, raw["top_ids"]),
            "reference_tokens": _texts(tokenizer, raw.get("reference_ids")),
        }
        return {name: named.get(name, raw.get(name)) for name in READINGS[NextToken]}
    if isinstance(readout, Generate):
        return _cut(tokenizer.decode(raw["token_ids"]), raw["stopped"], readout.stop)
    if isinstance(readout, Choices):
        choices = sweep.resolved[cell.row].choices
        best = max(range(len(choices)), key=lambda place: raw["choice_logprobs"][place])
        return {"choices": list(choices), **raw, "choice": choices[best]}
    return dict(raw)


def _texts(tokenizer: Any, ids: Sequence[int] | None) -> list[str] | None:
    return None if ids is None else [tokenizer.decode([one]) for one in ids]


def _cut(text: str, stopped: str, stop: str | None) -> dict[str, str]:
    """The text up to its stop string, wherever the tokens' borders fall."""
    place = text.find(stop) if stop else -1
    return {"text": text, "stopped": stopped} if place < 0 else {"text": text[:place], "stopped": "stop"}


def frame(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Any:
    """Rows as a pandas DataFrame with the run's columns; layers are nullable integers."""
    import pandas as pd

    table = pd.DataFrame({name: [row.get(name) for row in rows] for name in names}, columns=list(names))
    for name in ("source_layer", "target_layer"):
        table[name] = table[name].astype("Int64")
    for name in ("control", "error"):
        table[name] = table[name].astype(object).where(table[name].notna(), None)
    return table
