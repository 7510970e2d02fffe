"""Who runs: six ways to do the same sweep."""

from __future__ import annotations

from benchmarks.speed import floor, hooks, ours, traces
from benchmarks.speed.measure import Contender

CONTENDERS = {
    one.letter: one
    for one in (
        Contender(letter="a", title="transformers, hooks cell by cell", run=hooks.run, sampled="cells"),
        Contender(letter="b", title="nnsight, a trace per cell", run=traces.run_cells, sampled="cells"),
        Contender(letter="c", title="nnsight, a row per layer", run=traces.run_rows, sampled="targets"),
        Contender(letter="d", title="ours, all optimisations off", run=ours.run_unoptimised, sampled="sweep"),
        Contender(letter="e", title="ours", run=ours.run),
        Contender(letter="f", title="the floor", run=floor.run),
    )
}
