"""`patchscope serve`: nnsight's server of a vLLM engine, with what the traces of this package need.

The server runs code that its clients send. So it listens on this machine only, unless another address is
given.
"""

from __future__ import annotations

from typing import Any

# Import this before nnsight, whose `.save` on every object breaks it; anyio would import it at first use.
import anyio._backends._asyncio  # noqa: F401 (imported for its effect, and first)

from patchscope_nn._util.versions import DECIDING, versions_of
from patchscope_nn.backends.served.client import ABOUT
from patchscope_nn.models import preemptions, serve_vllm


def serve(name: str, *, host: str, port: int, key: str | None, **options: Any) -> None:
    """Load a model with vLLM, and serve it until the process ends.

    Args:
        name: The model: an id on the Hub, a folder or `builtin:NAME`.
        host: The address to listen on.
        port: The port.
        key: The key that clients need; None for none.
        **options: `dtype`, `revision` and vLLM's engine arguments.

    Raises:
        ModelError: vLLM cannot load the model.
    """
    import uvicorn
    from nnsight.modeling.vllm.serve.cli import _add_api_key_middleware
    from nnsight.modeling.vllm.serve.server import app, set_model

    _without_searching()
    model = serve_vllm(name, **options)
    set_model(model.traced)
    if key is not None:
        _add_api_key_middleware(app, key)
    _describe_itself(app, name, model)
    uvicorn.run(app, host=host, port=port, log_level="warning")


def _without_searching() -> None:
    """Let cloudpickle serialise functions that clients have sent without a search for their modules.

    They have none. The search tries each attribute of every loaded module, for seconds, and imports parts of
    transformers on the way.
    """
    from cloudpickle import cloudpickle

    cloudpickle._whichmodule = lambda function, _name: getattr(function, "__module__", None)  # noqa: SLF001


def _describe_itself(app: Any, name: str, model: Any) -> None:
    from fastapi import HTTPException

    engine, info = model.traced.vllm_entrypoint, model.info

    async def about() -> dict[str, Any]:
        try:
            await engine.check_health()
        except Exception as error:
            raise HTTPException(503, f"its engine is dead ({type(error).__name__})") from error
        return {
            "model": name,
            "dtype": info.dtype,
            "max_model_len": info.n_positions + 1,
            "held_tokens": info.held_tokens,
            "held_block": info.held_block,
            "preemptions": preemptions(model),
            "versions": versions_of((*DECIDING, "vllm")),
        }

    app.get(ABOUT)(about)
