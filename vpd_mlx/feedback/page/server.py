"""The page's server, on this machine alone. Starlette and uvicorn do the work; here is who may ask, and for what.

Other users of this machine, and other sites in the person's browser, must neither read nor write. So the server listens on the
loopback alone, and an answer needs the token of the address that the run printed, the right `Host` (or a foreign name could be
made to lead here) and, where the browser names one, the page's own origin.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from vpd_mlx.errors import RunError, VpdError
from vpd_mlx.feedback.page.board import Board, Refused

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    Handler = Callable[[Request], Awaitable[Response]]

__all__ = ["Server", "application"]

MOST_BYTES = 64 << 10  # of a request
PATIENCE = 10.0  # seconds for the server to start or end
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
TYPES = {"": "text/html", "page.js": "text/javascript", "page.css": "text/css"}


class Server:
    """Serves a board until it is closed, from a thread of its own."""

    def __init__(self, board: Board) -> None:
        import uvicorn  # late, like all of starlette: an extra

        token = secrets.token_urlsafe(24)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.bind(("127.0.0.1", 0))
        port = self._socket.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}/{token}/"
        config = uvicorn.Config(
            application(board, token, port), log_config=None, access_log=False, lifespan="off", ws="none", http="h11"
        )
        self._server = uvicorn.Server(config)
        sockets = [self._socket]
        self._thread = threading.Thread(target=lambda: self._server.run(sockets), name="page", daemon=True)
        self._thread.start()
        until = time.monotonic() + PATIENCE
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                self.close()
                raise RunError(f"feedback.human: the page's server did not start on 127.0.0.1:{port}; use terminal")
            time.sleep(0.01)

    def close(self) -> None:
        """End it."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(PATIENCE)
        self._socket.close()


def application(board: Board, token: str, port: int) -> Starlette:
    """The page, its data and its comments under `/TOKEN/`."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    def guarded(handle: Handler, *, data: bool) -> Handler:
        async def checked(request: Request) -> Response:
            refused = _refusal(request, token, hosts, data)
            response = await handle(request) if refused is None else refused
            response.headers.update(HEADERS)
            return response

        return checked

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "")
        if name not in TYPES:
            return PlainTextResponse("no such file", 404)
        text = (files("vpd_mlx.feedback.page") / (name or "page.html")).read_text(encoding="utf-8")
        return Response(text, media_type=TYPES[name])

    async def cards(request: Request) -> Response:
        version = request.query_params.get("version", "")
        return JSONResponse(board.view(int(version) if version.isdecimal() else -1))

    async def comment(request: Request) -> Response:
        if request.headers.get("content-type") != "application/json":  # what no form of a foreign page can send
            return PlainTextResponse("send application/json", 415)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return PlainTextResponse("too long", 413)
        try:
            given: Any = json.loads(body)
            board.comment(given.get("card"), given.get("text"), given.get("scope"))
        except (ValueError, AttributeError, RecursionError):
            return PlainTextResponse("not a comment", 400)
        except (Refused, VpdError) as error:
            return PlainTextResponse(str(error), 409)
        return JSONResponse(board.view(-1))

    return Starlette(
        routes=[
            Route("/{token}/cards", guarded(cards, data=True)),
            Route("/{token}/comment", guarded(comment, data=True), methods=["POST"]),
            Route("/{token}/", guarded(page, data=False)),
            Route("/{token}/{name}", guarded(page, data=False)),
        ]
    )


def _refusal(request: Request, token: str, hosts: set[str], data: bool) -> Response | None:
    """Why a request gets nothing, as a response; None where it may have what it asks for."""
    from starlette.responses import PlainTextResponse

    host, origin = request.headers.get("host"), request.headers.get("origin")
    if host not in hosts:
        return PlainTextResponse("this page answers to 127.0.0.1 alone", 421)
    if origin is not None and origin != f"http://{host}":
        return PlainTextResponse("another site may not ask here", 403)
    if data and request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return PlainTextResponse("another site may not ask here", 403)
    if not secrets.compare_digest(request.path_params["token"].encode(), token.encode()):
        return PlainTextResponse("wrong token: open the whole address that the run has printed", 404)
    return None
