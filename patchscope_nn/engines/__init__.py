"""How a step addresses a model: one adapter for each kind of engine."""

from patchscope_nn.engines.transformers import emit

__all__ = ["emit"]
