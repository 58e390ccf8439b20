"""Runs HAProxy for Ray Serve with every listener but the service's own bound to loopback.

Ray Serve 2.60 writes `bind *:PORT` and `bind :PORT` for HAProxy's statistics and metrics, with no setting to change
that. It starts HAProxy by a path that can be set: this file, through a two-line script (`write_script`). It rewrites
the configuration into a sibling file and becomes HAProxy by exec, so process id and signals are HAProxy's own.

Run as `python -IS haproxy_loopback.py HAPROXY HOST PORT ARGUMENT...`: only the standard library, and little of it,
for Ray starts HAProxy anew with each change of its backends.
"""

import os
import re
import shlex
import sys

_BIND = re.compile(r"^(\s*bind\s+)(\S*):(\d+)(?=\s|$)", re.MULTILINE)
_WILDCARDS = ("", "*", "0.0.0.0", "::", "[::]")
# Without the second option HAProxy 2.8 misses that a client has gone when the request's head and body came in two
# packets, as httpx sends them, and the expert would go on generating for nobody.
_ABORT = "option abortonclose\n"
_BUFFER = "option http-buffer-request\n"


def rewrite(configuration: str, host: str, port: int) -> str:
    """The same configuration with the service on HOST:PORT, every other wildcard bind on 127.0.0.1, and clients
    that go away noticed.
    """

    def address(bind: re.Match[str]) -> str:
        head, given, number = bind.groups()
        if int(number) == port:
            return f"{head}{host}:{number}"
        return f"{head}{'127.0.0.1' if given in _WILDCARDS else given}:{number}"

    return _BIND.sub(address, configuration).replace(_ABORT, f"{_ABORT}    {_BUFFER}")


def write_script(path: str, haproxy: str, host: str, port: int) -> None:
    """An executable at `path` that Ray may start in HAProxy's place."""
    command = " ".join(shlex.quote(part) for part in (sys.executable, "-IS", __file__, haproxy, host, str(port)))
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o700)) as script:
        script.write(f'#!/bin/sh\nexec {command} "$@"\n')


def main(haproxy: str, host: str, port: str, *arguments: str) -> None:
    """Become HAProxy, with its `-f` file rewritten, and die with the process that started us."""
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG; it survives the exec
    given = list(arguments)
    for index, argument in enumerate(given[:-1]):
        if argument == "-f":
            given[index + 1] = _rewritten(given[index + 1], host, int(port))
    os.execv(haproxy, [haproxy, *given])


def _rewritten(source: str, host: str, port: int) -> str:
    target = f"{source}.loopback"
    draft = f"{target}.{os.getpid()}"
    with open(source) as old, open(draft, "w") as new:  # noqa: PTH123 (importing pathlib would slow each start)
        new.write(rewrite(old.read(), host, port))
    os.replace(draft, target)  # noqa: PTH105 (whole at once: another HAProxy may be starting)
    return target


if __name__ == "__main__":
    main(*sys.argv[1:])
