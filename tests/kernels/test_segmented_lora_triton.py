"""The Triton kernels against the definition: on a GPU where there is one, else by Triton's interpreter.

The interpreter must be chosen before Triton is imported, so there the file runs itself in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from signalbox.kernels.segmented_lora import Segments, plan_tiles
from tests.kernels.test_segmented_lora import expected, filled, random_parts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
here = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="runs in the interpreter's process")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is the process that runs the kernels")
def test_kernels_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_kernels_compile_for_hopper_without_a_gpu() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from signalbox.kernels.segmented_lora_triton import blocks_of, expand_kernel, shrink_kernel

    for element, count in (("bf16", 16), ("fp16", 200), ("fp32", 2048)):
        sizes = blocks_of(count, 16, 4096, (4096, 1024, 1024))
        types = (
            dict.fromkeys("xaby", f"*{element}") | {"t": "*fp32"} | dict.fromkeys(("order", "tiles", "ranks"), "*i32")
        )
        constants = sizes | {"K": 4096, "WIDTH": 16, "OUT": 6144, "END_0": 4096, "END_1": 5120}
        for kernel in (shrink_kernel, expand_kernel):
            signature = {n: "constexpr" if n.isupper() else types.get(n, "i32") for n in kernel.arg_names}
            source = triton.compiler.ASTSource(kernel, signature, {n: constants[n] for n in signature if n.isupper()})
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
            assert compiled.asm["cubin"]
            print(kernel.__name__, element, count, {k: compiled.asm["ptx"].count(k) for k in ("mma", "cp.async")})


def segments_of(slots: list[int]) -> Segments:
    order, tiles = plan_tiles(slots)
    return Segments(len(slots), order=torch.from_numpy(order).to(DEVICE), tiles=torch.from_numpy(tiles).to(DEVICE))


TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
if INTERPRETED:  # its dot multiplies the bits of bfloat16 as integers
    del TOLERANCE[torch.bfloat16]


@here
@settings(max_examples=12 if INTERPRETED else 60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ranks=st.lists(st.integers(0, 64), min_size=1, max_size=4),
    slots=st.lists(st.integers(-1, 3), max_size=20),
    in_features=st.sampled_from([16, 40, 200]),
    outs=st.sampled_from([(24,), (160,), (32, 16, 16), (64, 64)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**20),
)
@example([8], [], 16, (24,), torch.float32, 0)
@example([8], [-1] * 3, 16, (24,), torch.float32, 0)
@example([13, 64], [1] * 20, 300, (24,), torch.float32, 1)
@example([8, 3], [0] * 150 + [-1] * 30 + [1] * 120, 40, (32,), torch.float32, 2)
def test_rows_get_their_adapter_and_base_rows_nothing(
    ranks: list[int], slots: list[int], in_features: int, outs: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    from signalbox.kernels.segmented_lora_triton import add_lora_triton

    slots = [min(slot, len(ranks) - 1) for slot in slots]
    generator = torch.Generator().manual_seed(seed)
    # Rounded to the dtype first, so that the reference has the same inputs.
    adapters = [
        [None if p is None else (p[0].to(dtype), p[1].to(dtype), 0.5) for p in parts]
        for parts in random_parts(ranks, in_features, outs, generator)
    ]
    weights = filled(adapters, 64, in_features, outs, dtype, DEVICE)
    x = torch.randn(len(slots), in_features, generator=generator).to(dtype)
    y = torch.randn(len(slots), sum(outs), generator=generator).to(dtype)
    y[torch.tensor([s < 0 for s in slots], dtype=torch.bool)] = -0.0
    out = y.clone().to(DEVICE)
    add_lora_triton(out, x.to(DEVICE), weights, segments_of(slots))
    out = out.cpu()
    torch.testing.assert_close(
        out.double(), expected(y, x, adapters, slots), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    base = [n for n, slot in enumerate(slots) if slot < 0]
    assert out[base].view(torch.uint8).tolist() == y[base].view(torch.uint8).tolist()


@here
def test_empty_tiles_of_reserved_segments_do_nothing() -> None:
    from signalbox.kernels.segmented_lora_triton import add_lora_triton

    generator = torch.Generator().manual_seed(3)
    adapters = random_parts([8, 5, 64], 64, (32,), generator)
    weights = filled(adapters, 64, 64, (32,), torch.float32, DEVICE)
    segments = Segments.reserve(9, 3, DEVICE)
    for slots in ([0] * 9, [2, 1, 0] * 3, [-1, 2] * 4 + [-1], [-1] * 9):
        segments.refill(slots)
        x, y = torch.randn(9, 64, generator=generator), torch.randn(9, 32, generator=generator)
        out = y.clone().to(DEVICE)
        add_lora_triton(out, x.to(DEVICE), weights, segments)
        torch.testing.assert_close(out.cpu().double(), expected(y, x, adapters, slots), rtol=1e-5, atol=1e-5)


@here
def test_slices_that_do_not_align_are_refused() -> None:
    from signalbox.kernels.segmented_lora_triton import blocks_of

    with pytest.raises(ValueError, match="multiples of 16"):
        blocks_of(4, 8, 64, (24, 8))
    assert blocks_of(4, 8, 64, (24,))["BLOCK_N"] == 128
