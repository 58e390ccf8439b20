"""Which GPUs, or which share of one, each expert's replicas get: checked to fit before any engine starts.

Ray places replicas by their share of a GPU and knows nothing of memory. An expert's share of memory is at most its
share of the GPU (`VllmExpert`), so that what Ray puts on one GPU also fits its memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from signalbox.experts.catalog import ExpertConfig, TransformersExpert, VllmExpert

_GRAIN = 1000  # Ray counts shares in ten-thousandths; thousandths, rounded down, always add up


class PlacementError(ValueError):
    """The experts do not fit the GPUs; the message is for the operator."""


def gpus_here() -> float:
    """GPUs of the Ray cluster that this process is connected to; 0 without one."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0)) if ray.is_initialized() else 0.0


def gpu_shares(experts: Mapping[str, ExpertConfig], gpus: float) -> dict[str, float]:
    """GPUs of each expert's replicas, on a machine that has `gpus`. Raises `PlacementError` where they do not fit.

    vLLM's experts get what they declare, transformers' equal shares of what is left (of everything, if nothing is).
    """
    shares = dict.fromkeys(experts, 0.0)
    left = [1.0] * int(gpus)
    vllm = {name: e for name, e in experts.items() if isinstance(e, VllmExpert)}
    for name, expert in vllm.items():
        shares[name] = expert.gpu_share if gpus or expert.gpus else 0.0
    wanted = sorted(((shares[name], name) for name, e in vllm.items() for _ in range(e.replicas)), reverse=True)
    for share, name in wanted:
        if not _take(left, share):
            raise PlacementError(_too_much(name, wanted, int(gpus)))
    others = {name: e for name, e in experts.items() if isinstance(e, TransformersExpert) and e.device != "cpu"}
    replicas = sum(expert.replicas for expert in others.values())
    if replicas and left:
        share = _even_share(left, replicas)
        shares |= dict.fromkeys(others, share)
    return shares


def _take(left: list[float], share: float) -> bool:
    """Place one replica: a share where the least is left that is enough, whole GPUs where nothing is taken."""
    if share < 1:
        fitting = [i for i, free in enumerate(left) if free >= share - 1e-9]
        if share and not fitting:
            return False
        if share:
            left[min(fitting, key=lambda i: left[i])] -= share
        return True
    whole = [i for i, free in enumerate(left) if free > 1 - 1e-9]
    if len(whole) < share:
        return False
    for i in whole[: int(share)]:
        left[i] = 0.0
    return True


def _even_share(left: list[float], replicas: int) -> float:
    """The largest share, in thousandths, of which as many as `replicas` fit into what is left."""
    for thousandths in range(_GRAIN, 0, -1):
        share = thousandths / _GRAIN
        if sum(int(free / share + 1e-9) for free in left) >= replicas:
            return share
    return 0.0


def _too_much(name: str, wanted: list[tuple[float, str]], gpus: int) -> str:
    if not gpus:
        return f"expert '{name}' wants a GPU (gpus), but this machine has none; with gpus: 0 it runs on the CPU"
    asked = ", ".join(f"{each} {share:g}" for share, each in wanted if share)
    total = sum(share for share, _ in wanted)
    return (
        f"the experts do not fit {gpus} GPU{'s' * (gpus > 1)}: they ask for {asked} (together {total:g}), and there is "
        f"no room for '{name}'; lower gpus or gpu_memory, or take replicas away"
    )
