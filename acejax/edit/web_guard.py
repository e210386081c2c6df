"""Requests that are too large are refused before they are read."""

from collections.abc import Awaitable, Callable
from typing import Any

Send = Callable[[dict[str, Any]], Awaitable[None]]


class BodyLimit:
    """ASGI middleware: 413 for a body of more than `most` bytes, 411 for one whose length is not told, 400 for none."""

    def __init__(self, app: Any, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        headers = dict(scope.get("headers") or ())
        length = headers.get(b"content-length")
        if scope["type"] == "http" and length is not None and not length.isdigit():
            return await _refuse(send, 400, "the length of the body is no number")
        if scope["type"] == "http" and length is not None and int(length) > self._most:
            return await _refuse(send, 413, f"at most {self._most / 1e6:.0f} MB at once")
        if scope["type"] == "http" and length is None and b"transfer-encoding" in headers:
            return await _refuse(send, 411, "the length of the body is not told")
        return await self._app(scope, receive, send)


async def _refuse(send: Send, status: int, why: str) -> None:
    body = why.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
