"""Ports for servers that a test starts."""

from __future__ import annotations

import contextlib
import random
import socket

_RANDOM = random.SystemRandom()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has, and that nobody is given until the test's server listens on it.

    It lies below the ports that the kernel gives to connections and that Signalbox gives to Ray's parts.
    """
    while True:
        port = _RANDOM.randrange(10_000, 20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
