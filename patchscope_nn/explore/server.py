"""The routes of the page, and serving it on loopback until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

# Before nnsight: its `.save` on every object breaks this module, which anyio would import when first used.
import anyio._backends._asyncio  # noqa: F401 (imported for its effect, and first)
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from patchscope_nn import __version__
from patchscope_nn.data.rows import BUILTIN, DataSpec, load_rows
from patchscope_nn.errors import InputError, PatchscopeError
from patchscope_nn.explore.answers import Answers
from patchscope_nn.explore.copies import as_python, as_yaml
from patchscope_nn.explore.guard import Guard
from patchscope_nn.explore.views import WINDOW, CellView, GridView, View
from patchscope_nn.explore.worker import Ask, Event, Worker, as_event
from patchscope_nn.spec import prompts

_PAGE = Path(__file__).parent / "page"
_LOOPBACK = "127.0.0.1"
#: How long open answers may take to end after Ctrl-C.
_GRACE_S = 2
_LAST = ("done", "error")


class Explorer:
    """The application.

    Args:
        answers: What answers; its models may be loaded already.
        models: The names of M and M* that the page starts with.
        view: The view that the page starts with, as a link holds it.
    """

    def __init__(self, answers: Answers, *, models: tuple[str, str], view: str = "") -> None:
        self.answers, self.models, self.view = answers, models, view
        self.worker = Worker()

    def app(self, *, token: str, port: int) -> ASGIApp:
        """The ASGI application, guarded.

        Args:
            token: The first part of every path.
            port: The port that it is served on.
        """
        routes = [
            Route("/", self._index),
            Route("/about", self._about),
            Route("/grid", self._grid, methods=["POST"]),
            Route("/cell", self._cell, methods=["POST"]),
            Route("/copy/{what:str}/{form:str}", self._copy, methods=["POST"]),
            Mount("/page", StaticFiles(directory=_PAGE)),
        ]
        return Guard(Starlette(routes=routes), token=token, port=port)

    async def _index(self, _: Request) -> Response:
        return FileResponse(_PAGE / "index.html")

    async def _about(self, _: Request) -> Response:
        """What the page needs to know to begin."""
        examples = {name: [next(iter(row.values())) for row in _rows(name)] for name in BUILTIN}
        lenses = [
            {
                "name": one.name,
                "title": one.title,
                "prompt": prompts.dump_prompt(one.scope.target.prompt) if one.scope.target.prompt else None,
                "layer": one.scope.target.layer,
            }
            for one in self.answers.lenses.values()
        ]
        source, target = self.models
        return JSONResponse(
            {
                "version": __version__,
                "source_model": source,
                "target_model": target,
                "view": self.view,
                "lenses": lenses,
                "examples": examples,
                "describe": prompts.DESCRIBE,
                "identity": prompts.IDENTITY,
                "window": WINDOW,
                "options": self.answers.options.words(),
            }
        )

    async def _grid(self, request: Request) -> Response:
        return await self._answer(request, GridView, self.answers.grid)

    async def _cell(self, request: Request) -> Response:
        return await self._answer(request, CellView, self.answers.cell)

    async def _answer(
        self, request: Request, kind: type[View], answer: Callable[[Any, Ask], None]
    ) -> Response:
        """Check what is asked, put it in the line, and stream what becomes of it."""
        try:
            view = kind(**await _mapping(request))
        except PatchscopeError as error:
            return JSONResponse(as_event(error), status_code=422)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        ask = Ask(lambda ask: answer(view, ask), lambda event: _hand(loop, events, event))
        return StreamingResponse(self._lines(ask, events), media_type="application/x-ndjson")

    async def _lines(self, ask: Ask, events: asyncio.Queue[Event]) -> AsyncIterator[str]:
        self.worker.submit(ask)
        try:
            event: Event = {}
            while event.get("event") not in _LAST:
                event = await events.get()
                yield json.dumps(event) + "\n"
        finally:
            # Where the page has gone away, or has dropped the request, nobody reads on.
            self.worker.cancel(ask)

    async def _copy(self, request: Request) -> Response:
        """A view as a recipe or as Python."""
        forms = {"recipe": as_yaml, "python": as_python}
        what, form = request.path_params["what"], request.path_params["form"]
        if what not in ("grid", "cell") or form not in forms:
            return Response("There is no such copy.\n", status_code=404, media_type="text/plain")
        try:
            given = await _mapping(request)
            if what == "grid":
                recipe = GridView(**given).recipe(self.answers.lenses)
            else:
                recipe = CellView(**given).recipe()
        except PatchscopeError as error:
            return JSONResponse(as_event(error), status_code=422)
        return JSONResponse({"text": forms[form](recipe, self.answers.options)})


def _hand(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """Hand an event from the worker's thread to the server's; at the end of the process it has none."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(events.put_nowait, event)


def _rows(name: str) -> list[dict[str, Any]]:
    return load_rows(DataSpec(builtin=name))


async def _mapping(request: Request) -> dict[str, Any]:
    """The body, which is a JSON object.

    Raises:
        InputError: It is not.
    """
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise InputError(f"the request is no JSON: {error}.", hint="Reload the page.") from None
    if not isinstance(body, dict):
        raise InputError("the request is no JSON object.", hint="Reload the page.")
    return body


def listen(port: int) -> socket.socket:
    """A socket on loopback.

    Args:
        port: The port; 0 takes a free one.

    Raises:
        InputError: The port is taken, or may not be used.
    """
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((_LOOPBACK, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise InputError(
            f"port {port} cannot be used: {getattr(error, 'strerror', None) or error}.",
            hint="Give another --port, or leave it out to take a free one.",
        ) from None
    return bound


def serve(explorer: Explorer, bound: socket.socket, *, opens: bool, told: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        explorer: The application.
        bound: What `listen` gave.
        opens: Whether the browser opens the page.
        told: Called with the page's address, once it is served.
    """
    token, port = secrets.token_urlsafe(24), bound.getsockname()[1]
    address = f"http://{_LOOPBACK}:{port}/{token}/"
    config = uvicorn.Config(
        explorer.app(token=token, port=port),
        log_level="warning",
        access_log=False,  # it would write the token
        timeout_graceful_shutdown=_GRACE_S,
        server_header=False,
    )

    def begun() -> None:
        told(address)
        if opens:
            # A browser of the terminal would hold up the server that it waits for.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    server = _Server(config, begun=begun, ending=explorer.worker.stop)
    with bound, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[bound])


class _Server(uvicorn.Server):
    """A server that says when it has begun, and ends its answers before it waits for them."""

    def __init__(
        self, config: uvicorn.Config, *, begun: Callable[[], None], ending: Callable[[], Any]
    ) -> None:
        super().__init__(config)
        self._begun, self._ending = begun, ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin, then say so."""
        await super().startup(sockets)
        self._begun()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers, then the connections."""
        await asyncio.to_thread(self._ending)
        await super().shutdown(sockets)
