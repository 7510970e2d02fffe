"""Printing of plans: the passes, the fit that a run uses, and the traffic between two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from patchscope_nn.cli.printing import out, out_json

if TYPE_CHECKING:
    from patchscope_nn.backends.crossing import Traffic
    from patchscope_nn.mappings import ResolvedMapping
    from patchscope_nn.plan import Plan


class Planned(NamedTuple):
    """The plan of a recipe or of one of its methods, with its mapping, traffic and folder."""

    plan: Plan
    mapping: ResolvedMapping
    crossing: Traffic | None
    folder: Path


def print_plans(planned: Mapping[str, Planned], *, as_json: bool) -> None:
    """Print plans by method as trees, with their fits and the traffic between models; or as JSON counts."""
    if as_json:
        counts = {name: _plan_counts(entry) for name, entry in planned.items()}
        out_json({"methods": counts} if len(counts) > 1 else next(iter(counts.values())))
        return
    for number, (name, entry) in enumerate(planned.items()):
        if len(planned) > 1:
            out(f"{'' if number == 0 else chr(10)}method: {name}")
        out(str(entry.plan))
        if entry.mapping.about:
            out(_fit_line(entry.mapping))
        if entry.crossing is not None:
            out(_crossing_line(entry.crossing))
        out(f"folder {entry.folder}")


def _plan_counts(planned: Planned) -> dict[str, Any]:
    from patchscope_nn.plan import count, stages

    plan, mapping, crossing = planned.plan, planned.mapping, planned.crossing
    return {
        "digest": plan.digest,
        "folder": str(planned.folder),
        "cells": plan.n_cells,
        "withheld": [str(entry) for entry in plan.withheld],
        **count(plan)._asdict(),
        "mapping": {"name": mapping.name, "weights": mapping.digest, "fit": dict(mapping.about) or None},
        "crossing": None if crossing is None else asdict(crossing),
        "stages": [{"with": name, **counts._asdict()} for name, counts in stages(plan)],
    }


def _fit_line(mapping: ResolvedMapping) -> str:
    """Describe the fit that a run uses, and its scores on held-out texts or rows."""
    about = mapping.about
    n_pairs = f"{len(mapping.maps)} pairs of layers"
    if "held_out" not in about:
        if "texts" in about:
            n_texts, n_held = (about["texts"][part]["n_texts"] for part in ("fitted_on", "held_out"))
            what = f"to be fitted before the run on {n_texts} texts ({n_held} held out)"
        else:
            what = f"to be trained before the run on {about['data']['n_rows']} rows, some of them held out"
        return f"mapping {mapping.name}: {n_pairs}, {what}, and saved in {about['file']}"
    line = f"mapping {mapping.name}: {about['kind']}, {n_pairs}"
    measured = []
    for key, name in _MEASURED.items():
        values = [scores[key] for *_, scores in about["held_out"] if key in scores]
        if values:
            measured.append(f"{min(values):.2f} to {max(values):.2f} {name}")
    if measured:
        what = "rows" if "n_rows" in about.get("data", ()) else "texts"
        line += f"; on held-out {what} {', '.join(measured)}"
    return line + (f"; {about['file']}" if "file" in about else "")


#: The scores of a fit that are printed, and their names.
_MEASURED = {
    "fraction_of_variance": "of the variance",
    "cosine": "cosine",
    "faithfulness": "faithfulness",
    "kl_nats": "nats KL",
    "logit_lens_kl_nats": "nats KL of the logit lens",
    "nll_nats": "nats a token",
    "untrained_nll_nats": "untrained",
    "shuffled_nll_nats": "with other rows' states",
}


def _crossing_line(crossing: Traffic) -> str:
    from patchscope_nn.plan.text import size_text

    more = f" and {crossing.distributions} distributions" if crossing.distributions else ""
    total = f"{size_text(crossing.bytes)} in {crossing.steps} steps"
    line = f"bridge: {crossing.states} states{more} cross to M*, {total}"
    if crossing.mapping == "identity":
        return line
    weights = size_text(crossing.weights)
    if crossing.mapped_here == crossing.steps:
        kept = f", and its weights ({weights}) stay here" if crossing.weights else ""
        return f"{line}; {crossing.mapping} maps them here, before they cross{kept}"
    where = "where M* runs"
    if crossing.mapped_here:
        where = f"here in {crossing.mapped_here} steps, and there in the others"
    sent = f"; its weights cross too ({weights} a step, counted)" if crossing.weights else ""
    return f"{line}; {crossing.mapping} maps them {where}{sent}"
