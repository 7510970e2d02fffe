"""An explorer of a tiny model, on a real server in this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import tiny
import uvicorn

from patchscope_nn.explore.answers import Answers
from patchscope_nn.explore.copies import Options
from patchscope_nn.explore.lenses import lenses
from patchscope_nn.explore.server import Explorer, listen

TOKEN = "not-so-secret"  # noqa: S105 (indeed)


def save_model(place, **options) -> str:
    """Save a tiny model in a folder; give its name."""
    module = tiny.make_module("llama", **options)
    module.config.max_position_embeddings = 4096  # texts are long in so small a vocabulary
    module.save_pretrained(place)
    tiny.TOKENIZER.save_pretrained(place)
    return str(place)


@contextmanager
def exploring(model: str, *, view: str = "") -> Iterator[Explorer]:
    """An explorer that begins with a model, and with a view."""
    made = Explorer(Answers(lenses(), Options()), models=(model, model), view=view)
    yield made
    assert made.worker.stop()


@contextmanager
def serving(explorer: Explorer) -> Iterator[str]:
    """The page's address, while it is served."""
    with listen(0) as bound:
        port = bound.getsockname()[1]
        app = explorer.app(token=TOKEN, port=port)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        yield f"http://127.0.0.1:{port}/{TOKEN}/"
        server.should_exit = True
        thread.join()
