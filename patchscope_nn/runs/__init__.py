"""One execution of a Patchscope or a recipe, from what is given to the folder it leaves.

run.py           ps.run: prepare, then run each method, then compare them
loading.py       M and M*, loaded where they run
prepare.py       models and data loaded, every cell resolved
prepared.py      what prepare gives
execute.py       a prepared run, step by step
manifest.py      what a run folder's manifest.json says
folder.py        the run folder while it is written
results.py       Run: a run read back
lazy_rows.py     the rows of a run, read when they are asked for
experiments.py   Experiment: the runs of several methods, and their comparison
explain.py       ps.explain
costs.py         what the recipes that ship cost
doctor.py        whether everything is in place
"""
