"""Save a run in a folder, load it in another session, and export its table, report and figures.

Usage: python 5_keep_and_plot_a_run.py [FOLDER]

Figures and report need `pip install 'patchscope-nn[figures]'`.
"""

import sys
from pathlib import Path

import patchscope_nn as ps

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
# Included recipes are loaded by name; `sets` changes fields, like `--set` on the command line.
recipe = ps.load_recipe("next-token", sets=["source.layer=[12,18,21,24,27,29]", "metrics=[precision_at_1]"])

# A second call with the same recipe, data and model resumes an interrupted run, and computes no finished
# cell twice.
ps.run(recipe, model="builtin:smollm2-135m-instruct", limit=12, out=folder)

run = ps.load_run(folder)  # needs no model
print(run)
print(f"computed by patchscope-nn {run.manifest['versions']['patchscope-nn']}, recipe {run.manifest['hash']}")

run.table().drop(columns=["target_prompt"]).to_csv(folder / "cells.csv", index=False)
report = run.report(folder / "report.html")  # one file that loads nothing from the network
figures = run.save_figures(folder / "figures", formats=["pdf", "png"])
for file in (folder / "cells.csv", report, *figures):
    print(f"wrote {file.relative_to(folder)} ({file.stat().st_size / 1024:.0f} KiB)")
