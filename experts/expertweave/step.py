"""Which adapter each token of the current step belongs to, on the device.

vLLM's model runners (V1 and V2) put a step's tokens in the order of the batch's requests; a hook around their input
preparation hands over that order. Between steps with the same requests, as in decoding, nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from signalbox.experts.expertweave.settings import SLOT_KEY
from signalbox.kernels.reroute import BASE


class StepIndex:
    """`tokens`: int32 [longest step], the slot of each token of the step, `BASE` for the base's and beyond its end."""

    def __init__(self, longest: int, device: torch.device) -> None:
        self.tokens: Tensor = torch.full((longest,), BASE, dtype=torch.int32, device=device)
        self.active = False  # whether any token of the step belongs to an adapter
        self._slots: dict[str, int] = {}  # of requests with an adapter
        self._requests: list[str] = []
        self._counts = np.zeros(0, dtype=np.int32)
        self._written = 0  # tokens that may differ from BASE on the device

    def begin(self, scheduled: Any) -> None:
        """Note which requests a step (vLLM's SchedulerOutput) brings, and which have ended."""
        for request_id in scheduled.finished_req_ids:
            self._slots.pop(request_id, None)
        for request in scheduled.scheduled_new_reqs:
            extra = getattr(request.sampling_params, "extra_args", None)
            if extra and SLOT_KEY in extra:
                self._slots[request.req_id] = int(extra[SLOT_KEY])

    def write(self, requests: Sequence[str], counts: np.ndarray) -> None:
        """The step's requests in the order of their tokens, and how many tokens each has."""
        if not self._slots and not self._written:
            return
        if requests == self._requests and np.array_equal(counts, self._counts):
            return
        self._requests, self._counts = list(requests), np.array(counts)
        slots = np.fromiter((self._slots.get(name, BASE) for name in requests), dtype=np.int32, count=len(requests))
        self.active = bool((slots != BASE).any())
        values = np.repeat(slots, self._counts)
        end = max(len(values), self._written)
        host = torch.full((end,), BASE, dtype=torch.int32, pin_memory=self.tokens.is_cuda)
        host[: len(values)] = torch.from_numpy(values)
        # The allocator of pinned memory keeps the block until the copy has been made.
        self.tokens[:end].copy_(host, non_blocking=True)
        self._written = len(values) if self.active else 0
