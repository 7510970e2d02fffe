"""Engines run steps on models: one engine for each kind of model.

engine.py        the contract
transformers.py  transformers models, in this process or on NDIF
vllm.py          vLLM models, in this process or served
"""

from patchscope_nn.engines.engine import Engine
from patchscope_nn.engines.transformers import Transformers
from patchscope_nn.engines.vllm import Vllm
from patchscope_nn.models import Model

#: The engines by name.
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (Transformers(), Vllm())}


def engine_of(model: Model) -> Engine:
    """Return the engine that runs a model."""
    return ENGINES[model.info.engine]


__all__ = ["ENGINES", "Engine", "Transformers", "Vllm", "engine_of"]
