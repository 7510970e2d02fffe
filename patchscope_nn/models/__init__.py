"""Models: loading and describing them, and finding their parts. Only this package knows architectures.

Parts are found through transformers' own interfaces (`get_decoder`, `get_input_embeddings`,
`get_output_embeddings`, the config's depth), and parts without an interface by the names in
`architecture.py`. The other packages address a part by its path, a plain string.
"""

from patchscope_nn.models.adapter import common_base, with_adapter, with_named_adapter
from patchscope_nn.models.architecture import find_architecture, input_device, is_offloaded
from patchscope_nn.models.info import (
    ELSEWHERE,
    TRANSFORMERS,
    VLLM,
    Feature,
    Model,
    ModelInfo,
    same_vocabulary,
)
from patchscope_nn.models.loading import load, serve_vllm
from patchscope_nn.models.memory import memory_reused, usable_memory
from patchscope_nn.models.turns import TURN, in_turn
from patchscope_nn.models.verdict import COSTS, CUT, FUSED, PLAIN, Comparison, Verdict, Withheld, cost_of
from patchscope_nn.models.vllm import preemptions
from patchscope_nn.models.weights import quantisation, weights_digest

__all__ = [
    "COSTS",
    "CUT",
    "ELSEWHERE",
    "FUSED",
    "PLAIN",
    "TRANSFORMERS",
    "TURN",
    "VLLM",
    "Comparison",
    "Feature",
    "Model",
    "ModelInfo",
    "Verdict",
    "Withheld",
    "common_base",
    "cost_of",
    "find_architecture",
    "in_turn",
    "input_device",
    "is_offloaded",
    "load",
    "memory_reused",
    "preemptions",
    "quantisation",
    "same_vocabulary",
    "serve_vllm",
    "usable_memory",
    "weights_digest",
    "with_adapter",
    "with_named_adapter",
]
