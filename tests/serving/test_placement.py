"""Shares of GPUs: what is declared, what fits, and what is said where it does not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from signalbox.experts.catalog import ExpertConfig, TransformersExpert, VllmExpert
from signalbox.serving.placement import PlacementError, gpu_shares


def vllm(**fields: object) -> VllmExpert:
    return VllmExpert.model_validate({"engine": "vllm", "model": "hf:a/b", **fields})


def transformers(**fields: object) -> TransformersExpert:
    return TransformersExpert.model_validate({"engine": "transformers", "model": "hf:a/b", **fields})


@pytest.mark.parametrize(
    ("fields", "share", "memory", "parallel"),
    [
        ({}, 1, 0.9, 1),
        ({"gpus": 0.3}, 0.3, 0.3, 1),
        ({"gpu_memory": 0.4}, 0.4, 0.4, 1),
        ({"gpus": 0.5, "gpu_memory": 0.45}, 0.5, 0.45, 1),
        ({"gpus": 2}, 2, 0.9, 2),
        ({"tensor_parallel_size": 4, "gpu_memory": 0.8}, 4, 0.8, 4),
        ({"gpus": 0}, 0, 0.9, 1),
    ],
)
def test_shares_follow_from_what_is_declared(
    fields: dict[str, object], share: float, memory: float, parallel: int
) -> None:
    expert = vllm(**fields)
    assert (expert.gpu_share, expert.memory_share, expert.parallel) == (share, memory, parallel)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpus": 1.5}, "a whole number of GPUs"),
        ({"gpus": 2, "tensor_parallel_size": 4}, "name one"),
        ({"gpus": 0.5, "tensor_parallel_size": 2}, "takes whole GPUs"),
        ({"gpus": 0.3, "gpu_memory": 0.5}, "no more than that share of its memory"),
    ],
)
def test_shares_that_contradict_each_other_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        vllm(**fields)


def test_what_fits_is_placed() -> None:
    experts: dict[str, ExpertConfig] = {"a": vllm(gpus=0.5), "b": vllm(gpus=0.3, replicas=1), "c": vllm(gpus=0.2)}
    assert gpu_shares(experts, 1) == {"a": 0.5, "b": 0.3, "c": 0.2}
    assert gpu_shares({"tp": vllm(gpus=2), **experts}, 3)["tp"] == 2


def test_without_gpus_vllm_runs_on_the_cpu_unless_it_was_told_otherwise() -> None:
    assert gpu_shares({"a": vllm(), "b": vllm(gpus=0)}, 0) == {"a": 0, "b": 0}
    with pytest.raises(PlacementError, match="'a' wants a GPU"):
        gpu_shares({"a": vllm(gpus=0.5)}, 0)


@pytest.mark.parametrize(
    ("experts", "gpus", "message"),
    [
        ({"a": vllm(gpus=0.6), "b": vllm(gpus=0.3), "c": vllm(gpus=0.3)}, 1, "together 1.2.*no room for 'b'"),
        ({"a": vllm(gpus=0.6, replicas=3)}, 2, "no room for 'a'"),
        ({"a": vllm(gpus=2), "b": vllm(gpus=0.1)}, 2, "no room for 'b'"),
        ({"a": vllm(gpus=4)}, 2, "no room for 'a'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_starts(
    experts: dict[str, ExpertConfig], gpus: int, message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        gpu_shares(experts, gpus)


def test_transformers_share_what_is_left() -> None:
    experts: dict[str, ExpertConfig] = {
        "v": vllm(gpus=0.5),
        "t": transformers(replicas=2),
        "cpu": transformers(device="cpu"),
    }
    assert gpu_shares(experts, 1) == {"v": 0.5, "t": 0.25, "cpu": 0}
    assert gpu_shares({"t": transformers(replicas=3)}, 2) == {"t": 0.5}
    assert gpu_shares({"t": transformers()}, 0) == {"t": 0}
