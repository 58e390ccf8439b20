"""What goes on in vLLM's own processes, and how the engine hears of it.

vLLM computes in child processes (the engine core; with tensor parallelism one more for each GPU). Its logging
configuration, `vllm_logging.json`, names `ReportHandler`, so each of them imports this module among the first things
it does. From then on it reports to the engine what it logs, ends with its parent however that ends, and keeps off
the network.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ADDRESS_ENV = "SIGNALBOX_VLLM_REPORTS"  # name of the abstract Unix datagram socket that the engine reads
ENGINE_ENV = "SIGNALBOX_VLLM_ENGINE"  # process id of the engine
FOLDER_ENV = "SIGNALBOX_VLLM_FOLDER"  # of the engine, private: where its processes find each other
LOGGING_CONFIG = Path(__file__).with_name("vllm_logging.json")

_MAX_RECORD = 32 * 1024  # bytes; longer tracebacks lose their beginning
_MAX_TRACE = 24 * 1024
_BOOTSTRAP_S = 60.0  # that multiprocessing has to say who the parent is


class ReportHandler(logging.Handler):
    """Sends each record of vLLM's log to the engine: one datagram, never blocking."""

    def __init__(self) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        """Send; a record that does not go out at once is lost."""
        address = os.environ.get(ADDRESS_ENV)
        if not address:
            return
        try:
            said: dict[str, Any] = {"level": record.levelno, "message": record.getMessage()[:4096]}
        except (TypeError, ValueError):  # arguments that do not fit the format
            said = {"level": record.levelno, "message": str(record.msg)[:4096]}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            said["error"] = f"{type(error).__name__}: {error}"[:2000]
            said["trace"] = "".join(traceback.format_exception(error))[-_MAX_TRACE:]
        with contextlib.suppress(OSError):
            self._socket.sendto(json.dumps(said).encode()[:_MAX_RECORD], "\0" + address)


class Reports:
    """The engine's end: receives the records of its processes, in a thread of its own.

    `on_record(level, message)` is called there with each. `first_error` is the first exception that was logged, as
    `Type: message`: the cause of a failed start, which vLLM itself only points at ("see root cause above").
    """

    def __init__(self, name: str, on_record: Callable[[int, str], None]) -> None:
        self.first_error: str | None = None
        self._on_record = on_record
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.address = f"signalbox-vllm-{os.getpid()}-{id(self):x}"
        self._folder = tempfile.mkdtemp(prefix="signalbox-vllm-")
        self._socket.bind("\0" + self.address)
        threading.Thread(target=self._receive, name=f"vllm-reports-{name}", daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What the processes of this engine are to find in theirs."""
        return {ADDRESS_ENV: self.address, ENGINE_ENV: str(os.getpid()), FOLDER_ENV: self._folder}

    def _receive(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while data := self._socket.recv(_MAX_RECORD):
                try:
                    said = json.loads(data)
                    level, text = int(said["level"]), str(said["message"])
                except (ValueError, KeyError, TypeError):  # a record that was cut
                    continue
                if "error" in said:
                    self.first_error = self.first_error or str(said["error"])
                    text = f"{text}\n{said.get('trace', said['error'])}"
                self._on_record(level, text)

    def close(self) -> None:
        """Stop listening, and remove the processes' folder."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _end_with_parent(folder: str) -> None:
    """Wait for the parent process to end, then end at once: a core that nobody talks to would hold its GPU."""
    deadline = time.monotonic() + _BOOTSTRAP_S
    while (parent := multiprocessing.parent_process()) is None:
        if time.monotonic() > deadline:  # a process of another kind, started by one of vLLM's
            return
        time.sleep(0.02)
    multiprocessing.connection.wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _rendezvous_by_file(folder: str) -> None:
    """Let torch's process groups find each other by a file instead of a TCP store, which listens on every address.

    vLLM 0.32 does so by itself; 0.25 and 0.27 do not. All processes of a group are given the same address, and it
    names the file.
    """
    import torch.distributed

    init = torch.distributed.init_process_group
    module = importlib.import_module("torch.distributed.rendezvous")
    rendezvous = module.rendezvous

    def by_file(url: str | None) -> str | None:
        if url is None or not url.startswith("tcp://"):
            return url
        return f"file://{folder}/{re.sub(r'[^0-9A-Za-z]+', '-', url)}"

    def init_process_group(backend: Any = None, init_method: str | None = None, *args: Any, **kwargs: Any) -> Any:
        return init(backend, by_file(init_method), *args, **kwargs)

    def rendezvous_by_file(url: str, *args: Any, **kwargs: Any) -> Any:  # vLLM's groups for data parallelism
        return rendezvous(by_file(url), *args, **kwargs)

    torch.distributed.init_process_group = init_process_group
    module.rendezvous = rendezvous_by_file  # type: ignore[attr-defined]


def _settle() -> None:
    """In a process that vLLM has started: see to its end and its sockets.

    vLLM 0.25 and 0.27 import this module while multiprocessing still unpickles what to run, and 0.32 after that. In
    the first case there is no `parent_process()` yet, so it cannot tell us whether this is a child.
    """
    folder = os.environ.get(FOLDER_ENV)
    if folder is None or os.environ.get(ENGINE_ENV) == str(os.getpid()):
        return
    threading.Thread(target=_end_with_parent, args=(folder,), name="end-with-parent", daemon=True).start()
    _rendezvous_by_file(folder)


_settle()
