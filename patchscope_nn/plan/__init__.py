"""Planning: cells -> the forward passes that serve them. Pure; no tensors, no weights."""

from patchscope_nn.plan.build import MAX_ROWS, MAX_TOKENS, plan
from patchscope_nn.plan.layout import Layout, Segment
from patchscope_nn.plan.passes import Context, Optimisations, Plan, SourcePass, State, Step, TargetPass

__all__ = [
    "MAX_ROWS",
    "MAX_TOKENS",
    "Context",
    "Layout",
    "Optimisations",
    "Plan",
    "Segment",
    "SourcePass",
    "State",
    "Step",
    "TargetPass",
    "plan",
]
