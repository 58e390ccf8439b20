"""The staging process: reads experts' weights from files into memory that it shares with vLLM's worker.

It is a process of its own because the worker's thread computes steps all the time, and a second thread there would
take the interpreter from it again and again. Run by `staging.Stager`; needs neither torch nor vLLM. Commands are lines
of JSON on standard input, [number, place, [[path, start, bytes], ...]]: read these parts one after the other into the
place. Answers are lines on standard output: [number, digest or null, error or null].
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

READERS = 4
ALIGNMENT = 64  # of each part in its place, bytes
PIECES, PIECE = 16, 4096  # of each part, for the digest


def stage(memory: memoryview, place: int, parts: list[tuple[str, int, int]]) -> str:
    """Read the parts; returns a digest of a sample of them, which equal contents have in common.

    Raises OSError, and EOFError where a file is shorter than it was.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, start, size in parts:
        view, done = memory[place : place + size], 0
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while done < size:
                count = os.preadv(descriptor, [view[done:]], start + done)
                if count == 0:
                    raise EOFError("a file became shorter while it was read")
                done += count
        finally:
            os.close(descriptor)
        digest.update(f"{size};".encode())
        step = max(PIECE, (size - PIECE) // (PIECES - 1))
        for at in range(0, size, step):
            digest.update(view[at : at + PIECE])
        digest.update(view[max(0, size - PIECE) :])
        place += -(-size // ALIGNMENT) * ALIGNMENT
    return digest.hexdigest()


def main() -> None:
    """Serve until standard input ends. Arguments: the descriptor of the shared memory, and its bytes."""
    descriptor, size = int(sys.argv[1]), int(sys.argv[2])
    memory = memoryview(mmap.mmap(descriptor, size))
    writing = threading.Lock()

    def work(number: int, place: int, parts: list[tuple[str, int, int]]) -> None:
        digest = error = None
        try:
            digest = stage(memory, place, parts)
        except (OSError, EOFError) as problem:
            error = str(problem)
        with writing:
            sys.stdout.write(json.dumps([number, digest, error]) + "\n")
            sys.stdout.flush()

    with ThreadPoolExecutor(READERS) as readers:
        for line in sys.stdin:
            readers.submit(work, *json.loads(line))


if __name__ == "__main__":
    main()
