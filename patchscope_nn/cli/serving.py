"""`patchscope serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from patchscope_nn.cli import options, printing


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face id, folder or builtin:NAME.")],
    *,
    host: Annotated[
        str, options.option("--host", "The address to listen on. Clients send code, which the server runs.")
    ] = "127.0.0.1",
    port: Annotated[int, options.option("--port", "The port to listen on.", min=1, max=65535)] = 6677,
    api_key: Annotated[
        str | None, options.option("--api-key", "The key that clients need, in the same variable.")
    ] = None,
    dtype: options.Dtype = "auto",
    engine_args: options.EngineArgs = None,
    json: options.Json = False,
) -> None:
    """Serve a model with vLLM, for `--remote vllm+http://HOST:PORT`."""
    from patchscope_nn.backends.served.server import serve as serve_model

    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        printing.note(f"Anyone who reaches {host}:{port} can run code on this machine; set --api-key.")
    address = f"vllm+http://{host}:{port}"
    if json:
        printing.out_json({"address": address, "model": model})
    else:
        printing.note(f"Loading {model} with vLLM; then: --remote {address} --model {model}")
    serve_model(
        model, host=host, port=port, key=api_key, dtype=dtype, **options.engine_arguments(engine_args)
    )
