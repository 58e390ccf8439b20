"""Checks `engine_args` of the configuration before anything starts, without importing vLLM."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

_CLASSES = ("EngineArgs", "AsyncEngineArgs")

# vLLM's names of what the configuration has fields of its own for.
FIELDS = {
    "model": "model",
    "tokenizer": "model",
    "max_num_seqs": "max_running",
    "max_model_len": "max_model_len",
    "gpu_memory_utilization": "gpu_memory",
    "tensor_parallel_size": "tensor_parallel_size",
    "dtype": "dtype",
    "load_format": "load_format",
    "enable_prefix_caching": "enable_prefix_caching",
    "enforce_eager": "enforce_eager",
    "enable_lora": "max_adapters",
    "max_loras": "max_adapters",
    "max_cpu_loras": "max_adapters",
    "max_lora_rank": "max_adapter_rank",
}
# What this engine decides.
_OURS = {
    "trust_remote_code": "a model brings weights here, never code",
    "distributed_executor_backend": "follows from tensor_parallel_size",
    "skip_tokenizer_init": "the engine detokenises",
    "disable_log_stats": "the service reads the engine's figures",
    "enable_log_requests": "prompts do not belong in logs",
    "lora_target_modules": "an adapter would be served without the modules that it leaves out",
}
# What ExpertWeave is told by, and needs.
_WOVEN = frozenset({"additional_config", "worker_extension_cls", "moe_backend"})


def installed() -> bool:
    """Whether vLLM can be imported here; it is not."""
    return importlib.util.find_spec("vllm") is not None


@lru_cache(maxsize=1)
def engine_argument_names() -> frozenset[str]:
    """The arguments of the installed vLLM's AsyncEngineArgs; empty where there is no vLLM.

    Read from its source, because importing it takes ten seconds, and on some machines a GPU.
    """
    spec = importlib.util.find_spec("vllm")
    names: set[str] = set()
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        with contextlib.suppress(OSError, SyntaxError):
            tree = ast.parse((Path(folder) / "engine" / "arg_utils.py").read_text())
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name in _CLASSES:
                    names |= {
                        item.target.id
                        for item in node.body
                        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                    }
    return frozenset(names)


def argument_problems(arguments: Mapping[str, Any], *, esft: bool = False) -> list[tuple[str, str]]:
    """(argument, what is wrong with it), `esft` adapters served or not. Unknown names are found where vLLM is there."""
    known = engine_argument_names()
    found = []
    for name in arguments:
        if name in FIELDS:
            found.append((name, f"is set by the expert's own field '{FIELDS[name]}'"))
        elif name in _OURS:
            found.append((name, f"is not for the configuration to set: {_OURS[name]}"))
        elif esft and name in _WOVEN:
            found.append((name, "is set for ESFT adapters (`esft`), which are not served with another value"))
        elif known and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            found.append((name, f"vLLM has no such argument; did you mean '{near[0]}'?"))
    return found
