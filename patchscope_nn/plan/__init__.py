"""Plans the forward passes that serve the cells of a sweep. Pure; no tensors, no weights.

build.py    the plan, and the six transformations that make it
survey.py   finds copies, and counts the cells
order.py    the order of the entries, by the tokens their target prompts begin with
sources.py  which source prompts a step runs
pack.py     which cells share a target pass
cut.py      cuts ordered items into batches that fit
layout.py   a packed target pass as segments of one sequence
budget.py   how much memory a pass may take
proven.py   switches off what the proof of a model does not allow
passes.py   the data of a plan: passes, steps, optimisations
count.py    counts passes, tokens and FLOPs
text.py     draws a plan as a tree
"""

from patchscope_nn.plan.budget import MAX_ROWS, MEMORY, Budget
from patchscope_nn.plan.build import Plan, plan
from patchscope_nn.plan.count import Counts, count, count_step, stages
from patchscope_nn.plan.layout import Layout
from patchscope_nn.plan.pack import from_cache, packs, shares_attention, why_copied
from patchscope_nn.plan.passes import Context, Optimisations, SourcePass, Step, TargetPass

__all__ = [
    "MAX_ROWS",
    "MEMORY",
    "Budget",
    "Context",
    "Counts",
    "Layout",
    "Optimisations",
    "Plan",
    "SourcePass",
    "Step",
    "TargetPass",
    "count",
    "count_step",
    "from_cache",
    "packs",
    "plan",
    "shares_attention",
    "stages",
    "why_copied",
]
