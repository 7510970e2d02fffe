"""CPU model actors for NDIF 0.1.2, plugged in where NDIF lets one be named; no file of ndif is edited.

NDIF's own actors call CUDA on loading and cleaning up. The controller still books a replica on a pretend
GPU (see `launch.py`), which nothing touches.
"""

from __future__ import annotations

import gc
import inspect
import time

import ray
from ndif.common.metrics import ModelLoadTimeMetric
from ndif.common.telemetry import elapsed_ms
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.remotable import Remotable


def _accept_trust_remote_code(name):
    """Ndif 0.1.2 passes a parameter that nnsight 0.8.1 has moved into the model key."""
    asked = getattr(Remotable, name).__func__
    parameters = inspect.signature(asked).parameters
    if "trust_remote_code" in parameters or "kwargs" in parameters:
        return

    def answer(cls, *args, trust_remote_code=False, **kwargs):
        return asked(cls, *args, **kwargs)

    setattr(Remotable, name, classmethod(answer))


class _Controller(_ControllerActor):
    def __init__(self, *args, **kwargs):
        for name in ("describe_checkpoint", "max_tp_size"):
            _accept_trust_remote_code(name)
        super().__init__(*args, **kwargs)


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class ControllerActor(_Controller):
    """The controller, for nnsight 0.8.1."""


class _CPUDeployment(BaseModelDeployment):
    #: To park a model outside its GPU means nothing here.
    CACHEABLE = False

    def __init__(self, *args, gpu_mem_bytes_by_id=None, **kwargs):
        super().__init__(*args, gpu_mem_bytes_by_id={}, **kwargs)

    def load_from_disk(self):
        started = time.time()
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        ModelLoadTimeMetric.update(
            model_key=self.model_key, duration_ms=elapsed_ms(started), load_type="initial", num_gpus=0
        )
        return model

    def cleanup(self):
        self.kill_switch.clear()
        self.kill_reason = None
        self.execution_ident = None
        self.model.interleaver.cancel()
        gc.collect()


@ray.remote(num_cpus=1, max_restarts=-1)
class ModelActor(_CPUDeployment):
    """A model on the CPU."""
