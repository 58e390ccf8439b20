"""One question for all formats: may this folder be used as an adapter of that base, and what is in it?"""

from __future__ import annotations

from pathlib import Path

from signalbox.adapters import esft_format, peft_format
from signalbox.adapters.base import AdapterError, AdapterFacts, BaseShape, Kind, Limits
from signalbox.adapters.files import AdapterFolder


def validate(path: Path, base: BaseShape, limits: Limits) -> AdapterFacts:
    """Check everything about the adapter in a folder: place, files, configuration, names, shapes, dtypes, all values.

    Blocking: some 20 ms for a LoRA of 5 MB, about a second for each gigabyte of ESFT. Raises `AdapterError` with
    `code` and, where one is at fault, `tensor`; `read_lora` and `EsftAdapter` list the codes.
    """
    if _served_kind(path, base, limits) == "lora":
        return peft_format.read_lora(path, base, limits).facts
    return esft_format.read_esft_facts(path, base, limits)


def check_outline(path: Path, base: BaseShape, limits: Limits) -> None:
    """`validate` without what takes long: of ESFT all but the tensors' values, of LoRA everything."""
    if _served_kind(path, base, limits) == "lora":
        peft_format.read_lora(path, base, limits)
    else:
        esft_format.EsftAdapter(path, base, limits).close()


def _served_kind(path: Path, base: BaseShape, limits: Limits) -> Kind:
    kind = adapter_kind(path, limits)
    if kind not in limits.kinds:
        served = " and ".join(limits.kinds) or "none"
        needed = "engine: vllm and " if kind == "esft" else ""
        raise AdapterError(
            f"{path} is an adapter of kind '{kind}'; the expert with {base.model} takes {served}: for this it needs "
            f"{needed}{kind} in its adapter_kinds",
            code="unsupported_kind",
            tensor=esft_format.CONFIG if kind == "esft" else peft_format.CONFIG,
        )
    return kind


def adapter_kind(path: Path, limits: Limits) -> Kind:
    """The format, by the configuration file in the folder. Raises `AdapterError` where there is none, or two."""
    with AdapterFolder(path, limits) as folder:
        lora, esft = folder.has(peft_format.CONFIG), folder.has(esft_format.CONFIG)
        where = folder.path
    if lora and esft:
        raise AdapterError(
            f"{where} holds both {peft_format.CONFIG} (LoRA) and {esft_format.CONFIG} (ESFT); which is it? Remove one",
            code="ambiguous",
        )
    if not lora and not esft:
        raise AdapterError(
            f"{where} holds neither {peft_format.CONFIG} (PEFT LoRA) nor {esft_format.CONFIG} (ESFT)",
            code="missing_file",
            tensor=peft_format.CONFIG,
        )
    return "lora" if lora else "esft"
