# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A small HTTP server around [`EndpointHandler`], for a container or a loopback.

`POST /` takes the handler's JSON, or an image's own bytes with `?instruction=...`; `GET /health` says `ok`.

    python -m segcompass_hf.hub.endpoint.server CHECKPOINT --port 8080
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from transformers.utils import logging

from .handler import THRESHOLDS

logger = logging.get_logger(__name__)

MAX_BODY = 32_000_000  # bytes; eight images of 3 MB in base64
READ_SECONDS = 20.0  # for a whole body


class EndpointServer(ThreadingHTTPServer):
    """Serves a handler.

    Args:
        handler (`Callable`): Takes a request as the endpoint does; an `error` in its answer sets the status.
        address (`tuple[str, int]`): Host and port; port 0 takes a free one.
        in_flight (`int`, defaults to 8): Requests in memory at a time; the others wait in their connections.
        max_body (`int`): Bytes of a request.
        read_seconds (`float`): For the body of a request.
    """

    daemon_threads = True
    request_queue_size = 512

    def __init__(
        self,
        handler: Any,
        address: tuple[str, int] = ("127.0.0.1", 0),
        in_flight: int = 8,
        max_body: int = MAX_BODY,
        read_seconds: float = READ_SECONDS,
    ):
        super().__init__(address, _Request)
        self.handler, self.max_body, self.read_seconds = handler, max_body, read_seconds
        self.in_flight = threading.BoundedSemaphore(in_flight)

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a connection broke", exc_info=True)


class _Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Request(BaseHTTPRequestHandler):
    server: EndpointServer
    timeout = READ_SECONDS  # between two bytes of a connection

    def do_GET(self) -> None:
        if urlsplit(self.path).path in ("/", "/health"):
            self._reply(200, {"status": "ok"})
        else:
            self._reply(404, _error(404, "GET /health, or POST / with a request."))

    def do_POST(self) -> None:
        with self.server.in_flight:
            try:
                data = self._data()
            except _Refused as refused:
                self.close_connection = True  # the rest of the body is not read
                self._reply(refused.status, _error(refused.status, str(refused)))
                return
            answer = self.server.handler(data)
        status = answer["error"]["status"] if isinstance(answer, dict) and "error" in answer else 200
        self._reply(status, answer)

    def _data(self) -> Any:
        if urlsplit(self.path).path != "/":
            raise _Refused(404, "POST / with a request.")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise _Refused(411, "Content-Length is missing or no number.")
        if len(length) > 12 or int(length) > self.server.max_body:
            raise _Refused(413, f"the request is longer than {self.server.max_body} bytes.")
        body = self._read(int(length))
        if self.headers.get_content_type().startswith("image/"):
            return {"inputs": body, "parameters": _from_query(dict(parse_qsl(urlsplit(self.path).query)))}
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Refused(400, "the body is no JSON.") from error

    def _read(self, length: int) -> bytes:
        deadline, body = time.monotonic() + self.server.read_seconds, bytearray()
        while len(body) < length:
            if time.monotonic() >= deadline:
                raise _Refused(408, f"the body took longer than {self.server.read_seconds:g} seconds.")
            try:
                self.connection.settimeout(max(0.1, deadline - time.monotonic()))
                part = self.rfile.read1(min(65_536, length - len(body)))
            except TimeoutError as error:
                raise _Refused(408, f"the body took longer than {self.server.read_seconds:g} seconds.") from error
            if not part:
                raise _Refused(400, f"the body ended after {len(body)} of {length} bytes.")
            body += part
        return bytes(body)

    def _reply(self, status: int, answer: Any) -> None:
        content = json.dumps(answer, allow_nan=False).encode("utf-8")
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.close_connection = True  # the client has gone

    def log_message(self, format: str, *args: Any) -> None:
        logger.info(format, *args)


def _from_query(query: dict[str, str]) -> dict[str, Any]:
    """Parameters as JSON would hold them; what is no number stays a text, which the handler refuses by name."""
    parameters: dict[str, Any] = dict(query)
    for kind, names in ((float, THRESHOLDS), (int, ("max_new_tokens", "votes")), (_listed, ("forbid", "require"))):
        for name in query.keys() & set(names):
            with contextlib.suppress(ValueError):
                parameters[name] = kind(query[name])
    return parameters


def _listed(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",")]


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"status": status, "message": message}}


def main(argv: list[str] | None = None) -> None:
    """Serve a checkpoint until interrupted."""
    from .handler import EndpointHandler

    parser = argparse.ArgumentParser(description="Serve a SegCompass checkpoint over HTTP.")
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on (%(default)s)")
    for name, what in (("forbid", "no mask may show"), ("require", "every mask has to show")):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="CONCEPT", help=f"concepts that {what}")
    args = parser.parse_args(argv)
    handler = EndpointHandler(args.checkpoint, forbid=args.forbid, require=args.require)
    server = EndpointServer(handler, (args.host, args.port))
    logger.warning("serving %s at %s", args.checkpoint, server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
