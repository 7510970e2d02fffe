"""nnsight's vLLM worker on a CPU: for tests on a machine without an accelerator.

nnsight changes vLLM's GPU worker. This does the same to its CPU worker.
"""

from nnsight.modeling.vllm.model_runners.GPUModelRunner import NNsightGPUModelRunner
from nnsight.modeling.vllm.workers.GPUWorker import NNsightGPUWorker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class Runner(NNsightGPUModelRunner, CPUModelRunner):
    """The CPU's model runner, with nnsight's interventions."""


class Worker(CPUWorker):
    """The CPU's worker, with nnsight's runner and its calls."""

    def init_device(self):
        """Make the CPU's runner, and turn it into nnsight's."""
        super().init_device()
        self.model_runner.__class__ = Runner


for _name, _value in vars(NNsightGPUWorker).items():
    if _name.startswith(("collect_nnsight", "nnsight_")):
        setattr(Worker, _name, _value)
