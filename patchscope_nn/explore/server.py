"""The routes of the explorer, and the server that runs on loopback until Ctrl-C."""

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

# Import this before nnsight, whose `.save` on every object breaks it; anyio would import it at first use.
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
from patchscope_nn.explore.worker import Event, Query, Worker, as_event
from patchscope_nn.spec import prompts

_PAGE = Path(__file__).parent / "page"
_LOOPBACK = "127.0.0.1"
#: How long open responses may take to end after Ctrl-C.
_GRACE_S = 2
_LAST = ("done", "error")


class Explorer:
    """The web application; `models` and `view` (the fragment of a link) are what the page starts with."""

    def __init__(self, answers: Answers, *, models: tuple[str, str], view: str = "") -> None:
        self.answers, self.models, self.view = answers, models, view
        self.worker = Worker()

    def app(self, *, token: str, port: int) -> ASGIApp:
        """Build the ASGI application with its access control; `token` is the first part of every path."""
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
        """Send what the page needs to start."""
        rows = {name: load_rows(DataSpec(builtin=name)) for name in BUILTIN}
        examples = {name: [next(iter(row.values())) for row in rows[name]] for name in BUILTIN}
        lenses = [{"name": lens.name, "title": lens.title} for lens in self.answers.lenses.values()]
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
                "options": self.answers.options.arguments(),
            }
        )

    async def _grid(self, request: Request) -> Response:
        return await self._answer(request, GridView, self.answers.grid)

    async def _cell(self, request: Request) -> Response:
        return await self._answer(request, CellView, self.answers.cell)

    async def _answer(
        self, request: Request, kind: type[View], answer: Callable[[Any, Query], None]
    ) -> Response:
        """Check a request, queue it, and stream its events."""
        try:
            view = kind(**await _json_object(request))
        except PatchscopeError as error:
            return JSONResponse(as_event(error), status_code=422)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        query = Query(lambda query: answer(view, query), lambda event: _enqueue(loop, events, event))
        return StreamingResponse(self._lines(query, events), media_type="application/x-ndjson")

    async def _lines(self, query: Query, events: asyncio.Queue[Event]) -> AsyncIterator[str]:
        self.worker.submit(query)
        try:
            event: Event = {}
            while event.get("event") not in _LAST:
                event = await events.get()
                yield json.dumps(event) + "\n"
        finally:
            # Reached early if the page was closed or has aborted the request.
            self.worker.cancel(query)

    async def _copy(self, request: Request) -> Response:
        """Send a view as a recipe or as Python."""
        forms = {"recipe": as_yaml, "python": as_python}
        what, form = request.path_params["what"], request.path_params["form"]
        if what not in ("grid", "cell") or form not in forms:
            return Response("There is no such copy.\n", status_code=404, media_type="text/plain")
        try:
            fields, lenses = await _json_object(request), self.answers.lenses
            recipe = GridView(**fields).recipe(lenses) if what == "grid" else CellView(**fields).recipe()
        except PatchscopeError as error:
            return JSONResponse(as_event(error), status_code=422)
        return JSONResponse({"text": forms[form](recipe, self.answers.options)})


def _enqueue(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """Pass an event from the worker's thread to the server's; it is lost if the loop has closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(events.put_nowait, event)


async def _json_object(request: Request) -> dict[str, Any]:
    """Read the body of a request; InputError if it is not a JSON object."""
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise InputError(f"the request is not valid JSON: {error}.", hint="Reload the page.") from None
    if not isinstance(body, dict):
        raise InputError("the request is not a JSON object.", hint="Reload the page.")
    return body


def listen(port: int) -> socket.socket:
    """Bind a socket on loopback; port 0 takes a free one.

    Raises:
        InputError: The port is in use, or not permitted.
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


def serve(
    explorer: Explorer, bound: socket.socket, *, open_browser: bool, announce: Callable[[str], None]
) -> None:
    """Serve the page on a socket of `listen` until Ctrl-C.

    `announce` is called with the page's address once it is served.
    """
    token, port = secrets.token_urlsafe(24), bound.getsockname()[1]
    address = f"http://{_LOOPBACK}:{port}/{token}/"
    config = uvicorn.Config(
        explorer.app(token=token, port=port),
        log_level="warning",
        access_log=False,  # it would contain the token
        timeout_graceful_shutdown=_GRACE_S,
        server_header=False,
    )

    def on_start() -> None:
        announce(address)
        if open_browser:
            # In a thread, because a text-mode browser blocks until it is closed, and it waits for the server.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    server = _Server(config, on_start=on_start, on_stop=explorer.worker.stop)
    with bound, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[bound])


class _Server(uvicorn.Server):
    """A server with callbacks for its start, and for its end before uvicorn waits for open responses."""

    def __init__(
        self, config: uvicorn.Config, *, on_start: Callable[[], None], on_stop: Callable[[], Any]
    ) -> None:
        super().__init__(config)
        self._on_start, self._on_stop = on_start, on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call `on_start`."""
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Call `on_stop`, then close the connections."""
        await asyncio.to_thread(self._on_stop)
        await super().shutdown(sockets)
