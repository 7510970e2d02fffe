"""Runs `patchscope` with vLLM on a CPU: `python tests/vllm/on_cpu.py run RECIPE --engine vllm`."""

import os
import sys
from pathlib import Path

#: What vLLM needs on a small CPU. Its processes inherit it.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def prepare():
    """Let nnsight's vLLM run on a CPU, in this process and in those that vLLM starts."""
    here = str(Path(__file__).parent)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, here)
    # As in `backends/served/server.py`: before nnsight.
    import anyio._backends._asyncio  # noqa: F401
    from nnsight.modeling.vllm import VLLM

    VLLM._WORKER_CLS = "cpu_worker.Worker"


if __name__ == "__main__":
    prepare()
    from patchscope_nn.cli import main

    main()
