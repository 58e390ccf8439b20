"""Log lines of all processes of a service on one terminal.

Ray writes what its workers print to files of its own. Ours send their records to a Unix datagram socket instead,
which the process that the operator started prints to standard error. Nothing is buffered: lines that come faster
than the terminal takes them are dropped, never waited for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

LEVEL_ENV = "SIGNALBOX_LOG_LEVEL"  # DEBUG, INFO, WARNING, ERROR
SOCKET_ENV = "SIGNALBOX_LOG_SOCKET"  # set for the processes of a running service

_MAX_RECORD = 32 * 1024  # bytes; longer tracebacks are cut
_FORMAT = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")


def configure() -> None:
    """Send records of `signalbox` to the service's socket, or to standard error where there is none.

    The level is that of the environment variable SIGNALBOX_LOG_LEVEL, by default INFO. Safe to call again.
    """
    logger = logging.getLogger("signalbox")
    level = os.environ.get(LEVEL_ENV, "INFO").upper()
    logger.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")
    address = os.environ.get(SOCKET_ENV)
    handler = _SocketHandler(address) if address else logging.StreamHandler()
    handler.setFormatter(_FORMAT)
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.propagate = False


class _SocketHandler(logging.Handler):
    """One datagram a record, never blocking.

    A library that configures its logging by a dictionary, as vLLM does, has Python close every handler there is
    (`logging.config`): this one opens its socket again.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        self._socket: socket.socket | None = None

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the reader is slow or gone
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)
            self._socket.sendto(self.format(record).encode(errors="replace")[:_MAX_RECORD], self._address)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        super().close()


class LogReceiver:
    """Receives the records of all processes and hands each, as text, to `write` (called in a thread of its own)."""

    def __init__(self, path: Path, write: Callable[[str], None]) -> None:
        self.path = path
        self._write = write
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        threading.Thread(target=self._receive, name="log-receiver", daemon=True).start()

    def _receive(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while text := self._socket.recv(_MAX_RECORD):
                self._write(text.decode(errors="replace"))

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        self._socket.close()
        self.path.unlink(missing_ok=True)
