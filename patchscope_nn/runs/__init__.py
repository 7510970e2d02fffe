"""One execution of a Patchscope or a recipe, from the user's arguments to the run folder.

run.py           ps.run: prepare, then run each method, then compare them
loading.py       loads M and M* where they run
prepare.py       loads models and data, and resolves every cell
prepared.py      the result of `prepare`
execute.py       executes a prepared run step by step
manifest.py      the contents of a run folder's manifest.json
folder.py        writes the run folder, and finds in it what a run that has grown still has
parts.py         the finished cells of a run folder
identity.py      what the cells of a folder have in common, and what may not be mixed
reuse.py         takes finished cells from other runs
shards.py        divides a run into parts that run in different places
merge.py         ps.merge: joins shards, or runs over different data rows
results.py       Run: the results of a run
experiments.py   Experiment: the runs of several methods, and their comparison
explain.py       ps.explain
costs.py         the costs of the included recipes
doctor.py        checks of the installation, a model or a server
conformance.py   checks of a kind of readout
"""
