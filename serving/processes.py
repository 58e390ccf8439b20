"""Processes that must not outlive us: Linux's parent-death signal, adopted orphans, and their end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)  # looked up before any fork: a forked child must not load libraries


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Have this process sent `signal_number` when the thread that started it ends, even by SIGKILL."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that `descendants` goes on finding it."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants() -> list[psutil.Process]:
    """All processes below this one that still run."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def reap() -> None:
    """Collect the exit of every child that has ended, adopted ones too."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def kill_descendants(timeout_s: float = 5.0) -> list[psutil.Process]:
    """Kill everything below this process until nothing is left; returns what was killed.

    Repeated, because a process may have started another between the look and the kill. The killed are first
    stopped, so that a supervisor among them cannot start anew what was just killed.
    """
    killed: dict[int, psutil.Process] = {}
    deadline = time.monotonic() + timeout_s
    while (left := descendants()) and time.monotonic() < deadline:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        killed.update({process.pid: process for process in left})
        reap()
        time.sleep(0.01)
    reap()
    return list(killed.values())
