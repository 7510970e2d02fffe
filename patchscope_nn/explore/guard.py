"""Who may ask: the page that was opened with the token, and nobody else.

The server listens on loopback alone, but every page a browser shows can send requests there. So each
request must carry the token in its path, name this server as its Host (a page whose domain was made to point
here names that domain), come from this origin where it says where it comes from, and be small.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: The most bytes of a request's body: a prompt of 10,000 characters, however they are written, fits.
MAX_BODY = 256 * 1024
_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_START = "Open the address that `patchscope explore` printed in its terminal."


class Guard:
    """Refuses what does not come from the page, and takes the token off the path of what does.

    Args:
        app: What answers.
        token: The first part of every path.
        port: The port that is served.
    """

    def __init__(self, app: ASGIApp, *, token: str, port: int) -> None:
        self.app, self.token = app, token
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        token, slash, rest = scope["path"].removeprefix("/").partition("/")
        reason = self._refuses(headers, token)
        if reason is not None:
            await PlainTextResponse(f"{reason}\n", status_code=403, headers=_HEADERS)(scope, receive, send)
        elif not slash:
            redirect = RedirectResponse(f"/{self.token}/", headers={"cache-control": "no-store"})
            await redirect(scope, receive, send)
        else:
            inner = {**scope, "path": f"/{rest}", "raw_path": None, "root_path": ""}
            await self._pass(inner, headers, receive, send)

    def _refuses(self, headers: Headers, token: str) -> str | None:
        """Why a request is refused."""
        if headers.get("host", "") not in self.hosts:
            return "This server answers to its own address only. " + _START
        origin = headers.get("origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.hosts}:
            return "Requests from other pages are refused."
        # A link on another page may lead here, for whoever knows the token; its scripts may not ask.
        asked_by = headers.get("sec-fetch-site", "none")
        if asked_by not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate":
            return "Requests from other pages are refused."
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return "The token of this address is not this server's. " + _START
        return None

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """Let a request through once its body has come and is small, and add the headers to its answer."""
        length = headers.get("content-length", "0")
        body = await _body(receive) if length.isdecimal() and int(length) <= MAX_BODY else None
        if body is None:
            said = f"A request may hold {MAX_BODY} bytes.\n"
            refusal = PlainTextResponse(said, status_code=413, headers=_HEADERS)
            await refusal(scope, receive, send)
            return
        given = [body]

        async def replayed() -> Message:
            """The body, once; then whatever comes, which is the end of the connection."""
            if given:
                return {"type": "http.request", "body": given.pop(), "more_body": False}
            return await receive()

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self.app(scope, replayed, dressed)


async def _body(receive: Receive) -> bytes | None:
    """A request's body; None where it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return bytes(body)
