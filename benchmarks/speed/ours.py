"""(d) and (e): a Patchscope, run by this package with all its optimisations off, and as it is."""

from __future__ import annotations

import math
from typing import Any

import patchscope_nn as ps
from benchmarks.speed.workloads import Answers, Cell, Said, Workload
from patchscope_nn.models import Model


def run(workload: Workload, source: Model, target: Model) -> Answers:
    """Ours, as its user runs it."""
    return _run(workload, source, target)


def run_unoptimised(workload: Workload, source: Model, target: Model) -> Answers:
    """Ours, with every optimisation off."""
    return _run(workload, source, target, optimisations=ps.Optimisations.none())


def run_within(workload: Workload, model: Model, *, memory: int) -> Answers:
    """Ours, within a budget of so many bytes."""
    return _run(workload, model, model, memory=memory)


def _run(workload: Workload, source: Model, target: Model, **options: Any) -> Answers:
    return answers_of(start(workload, source, target, **options), workload)


def start(workload: Workload, source: Model, target: Model, **options: Any) -> ps.Run:
    """Run a workload with options of `ps.run`."""
    if workload.chosen is not None:
        raise ValueError("A Patchscope sweeps; it does not run single cells.")
    count = workload.max_new_tokens
    scope = ps.Patchscope(
        source=ps.Source(prompt="{text}", position=-1, layer=list(workload.layers)),
        target=ps.Target(
            prompt=list(workload.target),
            position=workload.position,
            layer="same" if workload.target_layers is None else list(workload.target_layers),
        ),
        mapping=workload.mapping or "identity",
        readout=ps.Generate(max_new_tokens=count) if count else ps.NextToken(top_k=1),
    )
    rows = [{"text": text} for text in workload.texts]
    return ps.run(scope, source_model=source, target_model=target, data=rows, **options)


def answers_of(run: ps.Run, workload: Workload) -> Answers:
    """What the cells of a run say."""
    return {
        Cell(row["row"], row["source_layer"], row["target_layer"]): (
            Said(row["text"])
            if workload.max_new_tokens
            else Said(row["top_ids"][0], math.log(row["top_probs"][0]))
        )
        for row in run.rows
    }
