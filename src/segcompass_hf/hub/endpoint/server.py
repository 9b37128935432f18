# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The application on a socket: what uvicorn is told, time for a request's head, and an end that loses no request."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import create_app
from .handler import RequestHandler
from .service import ServerLimits, Service

HEAD_SECONDS = 20.0  # between two bytes of a request's head
CLOSING_SECONDS = 10  # for answers on their way when the server stops
BACKLOG = 512  # connections that the system holds before they are accepted


class _TimedProtocol(H11Protocol):
    """Closes connections on which no request arrives; uvicorn itself waits for the first one without end."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # ends the wait
        self._wait_for_head()

    def _wait_for_head(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)


class Server(uvicorn.Server):
    """Serves a handler.

    The first SIGTERM or Ctrl-C drains: requests that were let in are answered, others refused, then the server stops.
    A second one stops it without answering them.

    Args:
        handler ([`RequestHandler`]): Answers.
        limits ([`ServerLimits`], *optional*): What is taken on.
    """

    def __init__(self, handler: RequestHandler, limits: ServerLimits | None = None):
        self.service = Service(handler, limits)
        self._asked_to_stop: tuple[int, FrameType | None] | None = None
        config = uvicorn.Config(
            create_app(self.service),
            http=_TimedProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,  # the application's has the requests' ids
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._asked_to_stop is not None:
            super().handle_exit(sig, frame)
        self._asked_to_stop, self.service.draining = (sig, frame), True

    async def on_tick(self, counter: int) -> bool:
        if self._asked_to_stop is not None and not self.should_exit and self.service.active == 0:
            super().handle_exit(*self._asked_to_stop)
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """A socket for [`Server.run`], which nobody can connect to until then; port 0 takes a free one.

    Raises:
        OSError: The address is taken, or not of this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def log_to_terminal() -> None:
    """Let the log's lines, one per request, go to stderr."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    for name in ("segcompass_hf", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
