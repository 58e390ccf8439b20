"""Runs the service in a child process and sees to its end: nothing it started is left, however it ended.

The operator's process does nothing but wait and act on signals, so that no hanging call inside Ray can make it deaf.
The child does the work. Each adopts the orphans below it; if the operator's process is killed outright, the child is
told by the kernel and stops by itself.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from signalbox.serving.processes import adopt_orphans, die_with_parent, kill_descendants

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop(BaseException):
    """Raised in the child's main thread, wherever it is, when the service is to stop."""


def stop_on_signals() -> None:
    """Have the first stop signal raise `Stop` in this process; later ones are the supervisor's business."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stop

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def run_supervised(work: Callable[[], int], *, grace_s: int = 30) -> int:
    """Run `work` in a child process and return the exit code for ours.

    The first SIGINT, SIGTERM or SIGHUP asks the child to stop (it gets SIGTERM); a second one, or `grace_s` seconds,
    kills. The exit code is the child's own; 130 if it was killed after a signal, 1 if it died by itself. `work` runs
    with the signals' default actions and must call `stop_on_signals` for a clean end.
    """
    adopt_orphans()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # none may fall between fork and handler
    child = os.fork()
    if child == 0:
        _work(work, parent)

    asked = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += number != signal.SIGALRM
        if asked == 1 and number != signal.SIGALRM:
            os.kill(child, signal.SIGTERM)
            signal.alarm(grace_s)
        else:
            os.kill(child, signal.SIGKILL)

    for number in (*STOP_SIGNALS, signal.SIGALRM):
        signal.signal(number, on_signal)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        while True:
            pid, status = os.waitpid(-1, 0)  # orphans too: nothing is left a zombie
            if pid == child:
                break
    finally:
        signal.alarm(0)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        kill_descendants()
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    return 130 if asked else 1


def _work(work: Callable[[], int], parent: int) -> None:
    code = 1
    try:
        os.setsid()  # Ctrl-C reaches the supervisor alone, which then says so once
        die_with_parent(signal.SIGTERM)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        adopt_orphans()
        if os.getppid() == parent:
            code = work()
    except Stop:
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        kill_descendants()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
