"""Fitting mappings: closed forms on states that two models, or two layers, have of the same texts."""

from patchscope_nn.fit.cached import PlannedFit, plan_fit, same_model
from patchscope_nn.fit.pairs import parse_pairs
from patchscope_nn.fit.run import fit_mapping

__all__ = ["PlannedFit", "fit_mapping", "parse_pairs", "plan_fit", "same_model"]
