"""The host's work does not grow with the cells: the package calls few of its own functions for each."""

from __future__ import annotations

import tiny
from calls import calls

import patchscope_nn as ps

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def test_a_cell_takes_few_calls(tiny_model, tmp_path):
    """Prompts are resolved one by one; what is planned, run and written for their cells is arrays.

    The report, which shows a limited number of cells, is not counted.
    """
    model = tiny_model("llama")
    scope = ps.Patchscope(
        source=ps.Source(prompt="{t} is", position={"each": "all"}),
        target=ps.Target(prompt="The city of Paris x", position="x", layer="all"),
        readout=ps.NextToken(reference="source"),
    )

    def run(n_rows):
        rows = [{"t": f"Diana {first}{second} in Paris"} for first in LETTERS for second in LETTERS][:n_rows]
        options = {"model": model, "controls": ["random", "unpatched"], "metrics": ["precision_at_1"]}
        options |= {
            "report": False,
            "optimisations": ps.Optimisations(overlap=False),
        }  # all calls in this thread
        numbers.append(len(ps.run(scope, data=rows, out=tmp_path / str(n_rows), **options).rows))

    numbers = []
    run(1)
    few, many = (calls(lambda n_rows=n_rows: run(n_rows)) for n_rows in (10, 40))
    n_cells = numbers[2] - numbers[1]
    assert n_cells > 30 * 2 * tiny.N_LAYERS**2 * 4
    assert (many - few) / n_cells < 3
