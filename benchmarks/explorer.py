"""How long the explorer's page waits: python -m benchmarks.explorer.

The builtin model's grid of a 20-token prompt, and the first and the last token of descriptions of its states,
as a client of the server sees them; beside the machine's load, without which they say little.
"""

from __future__ import annotations

import os
import threading
import time
from statistics import median

# Before nnsight, as the explorer itself does.
from patchscope_nn.explore.server import Explorer, listen  # isort: skip
import httpx
import torch
import uvicorn

from patchscope_nn.explore.answers import Answers
from patchscope_nn.explore.copies import Options
from patchscope_nn.explore.lenses import lenses
from patchscope_nn.models import builtin

PROMPT = "Travellers who want to see the Eiffel Tower, which stands in Paris, should book a"
N_TOKENS, TIMES = 20, 5


def timed(url: str, **view: object) -> tuple[float, float]:
    """Seconds to the first token, or to the grid, and to the end."""
    names = {"prompt": PROMPT, "source_model": builtin.NAME, "target_model": builtin.NAME}
    started, first = time.perf_counter(), 0.0
    with httpx.stream("POST", url, json={**names, **view}, timeout=600) as answer:
        for line in answer.iter_lines():
            if not first and line.startswith(('{"event": "text"', '{"event": "grid"')):
                first = time.perf_counter() - started
    return first, time.perf_counter() - started


def main() -> None:
    answers = Answers(lenses(), Options())
    model, _ = answers.load(builtin.NAME, builtin.NAME)
    assert len(model.tokenizer(PROMPT)["input_ids"]) == N_TOKENS
    answers.warm_up(builtin.NAME, builtin.NAME)
    explorer = Explorer(answers, models=(builtin.NAME, builtin.NAME))
    with listen(0) as bound:
        port = bound.getsockname()[1]
        app = explorer.app(token="x", port=port)  # noqa: S106 (the token of a server that only this benchmark uses)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            measure(f"http://127.0.0.1:{port}/x/")
        finally:
            server.should_exit = True
            thread.join()
            explorer.worker.stop()


def measure(page: str) -> None:
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for lens in ("token-identity", "logit-lens"):
        seconds = [timed(f"{page}grid", lens=lens)[0] for _ in range(TIMES)]
        print(f"grid, {lens}: {median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    # Each is another state: what was said is not remembered by the server.
    cells = [timed(f"{page}cell", position=10, layer=layer) for layer in range(8, 8 + TIMES)]
    for what, seconds in zip(("first token", "all 20 tokens"), zip(*cells, strict=True), strict=True):
        print(f"{what}: {median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
