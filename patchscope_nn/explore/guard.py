"""Access control: only the page that was opened with the token may send requests.

The server listens on loopback only, but any page in a browser can send requests there. So each request must
carry the token in its path, name this server as its Host (DNS rebinding: a page whose domain resolves to this
machine names its own domain), have this origin if it has any, and be small.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: The largest body of a request, in bytes: enough for a prompt of 10,000 characters in any encoding.
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
    """Middleware that refuses requests not made by the page, and strips the token from the path."""

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
        reason = self._refusal(headers, token)
        if reason is not None:
            await PlainTextResponse(f"{reason}\n", status_code=403, headers=_HEADERS)(scope, receive, send)
        elif not slash:
            redirect = RedirectResponse(f"/{self.token}/", headers={"cache-control": "no-store"})
            await redirect(scope, receive, send)
        else:
            inner = {**scope, "path": f"/{rest}", "raw_path": None, "root_path": ""}
            await self._pass(inner, headers, receive, send)

    def _refusal(self, headers: Headers, token: str) -> str | None:
        """Return the reason for refusing a request, or None."""
        if headers.get("host", "") not in self.hosts:
            return "This server answers only at its own address. " + _START
        origin = headers.get("origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.hosts}:
            return "Requests from other pages are refused."
        # Another page may link here, if it knows the token, but its scripts may not send requests.
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate":
            return "Requests from other pages are refused."
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return "The token in this address is wrong. " + _START
        return None

    async def _pass(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        """Read the body, check its size, pass the request on, and add security headers to the response."""
        length = headers.get("content-length", "0")
        body = await _body(receive) if length.isdecimal() and int(length) <= MAX_BODY else None
        if body is None:
            limit = f"A request may have at most {MAX_BODY} bytes.\n"
            refusal = PlainTextResponse(limit, status_code=413, headers=_HEADERS)
            await refusal(scope, receive, send)
            return
        unread = [body]

        async def replay() -> Message:
            """Return the body on the first call; later calls wait for the connection to close."""
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            return await receive()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self.app(scope, replay, send_with_headers)


async def _body(receive: Receive) -> bytes | None:
    """Read the body of a request; None if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return bytes(body)
