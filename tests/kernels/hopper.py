"""Shared by the tests of Triton kernels: the interpreter's own process, compilation for a GPU that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_interpreted(file: str) -> None:
    """Run a test file in a process where Triton interprets its kernels (chosen before Triton is imported)."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def compile_for_hopper(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int = 3,
    maxnreg: int | None = None,
) -> tuple[str, dict[str, int]]:
    """The PTX and what the kernel takes: registers a thread, bytes of shared memory, of stack and of spilled registers.

    types: of arguments that are not int32 (pointers as "*bf16"); pointers and int64 (strides) are taken to be multiples
    of 16, as they are in use.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    signature = {name: "constexpr" if name.isupper() else types.get(name, "i32") for name in kernel.arg_names}
    values = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*") or kind == "i64"
    }
    source = triton.compiler.ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return compiled.asm["ptx"], found | {"shared": compiled.metadata.shared}
