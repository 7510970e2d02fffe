"""Planning: cells -> the forward passes that serve them. Pure; no tensors, no weights.

`build` makes a plan of `passes`: in an `order` of the data rows, with `sources` read once and cells `pack`ed
within a `budget`, as a `layout` of segments where that can be. `count` counts it, `text` draws it.
"""

from patchscope_nn.plan.budget import MAX_ROWS, MEMORY, Budget
from patchscope_nn.plan.build import Plan, plan
from patchscope_nn.plan.count import Counts, count, count_step, stages
from patchscope_nn.plan.layout import Layout, Segment
from patchscope_nn.plan.pack import from_cache, packs, shares_attention
from patchscope_nn.plan.passes import Context, Optimisations, SourcePass, State, Step, TargetPass
from patchscope_nn.plan.sources import terms_of

__all__ = [
    "MAX_ROWS",
    "MEMORY",
    "Budget",
    "Context",
    "Counts",
    "Layout",
    "Optimisations",
    "Plan",
    "Segment",
    "SourcePass",
    "State",
    "Step",
    "TargetPass",
    "count",
    "count_step",
    "from_cache",
    "packs",
    "plan",
    "shares_attention",
    "stages",
    "terms_of",
]
