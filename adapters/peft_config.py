"""PEFT's `adapter_config.json` for LoRA: what it says of each module, and what of it we do not compute.

The meaning of the keys and the matching rules are those of peft 0.21 (`LoraConfig`; `check_target_module_exists` and
`get_pattern_key` there). Keys that are not named here do not change what a finished adapter computes (dropout, task
type, how it was initialised and trained); newer versions write many of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from signalbox.adapters.base import AdapterError
from signalbox.adapters.files import shown
from signalbox.adapters.name_pattern import Budget, NamePattern, PatternError

MAX_PATTERNS = 8192  # entries of a list or map

# What changes the computation and is not built: the key, whether its value asks for it, and what it is.
_asks: Callable[[Any], bool] = bool
_UNSUPPORTED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("use_dora", _asks, "DoRA rescales the base's weights"),
    ("modules_to_save", _asks, "whole modules trained beside the LoRA are not part of an adapter here"),
    ("bias", lambda value: value not in (None, "none"), "trained biases change the base for all requests"),
    ("fan_in_fan_out", _asks, "weights stored as (in, out) belong to Conv1D models"),
    ("trainable_token_indices", _asks, "trained token embeddings are not supported"),
    ("lora_bias", _asks, "a bias in lora_B is not supported"),
    ("alora_invocation_tokens", _asks, "activated LoRA (aLoRA) starts in the middle of a prompt"),
    ("layer_replication", _asks, "replicated layers need a deeper base"),
    ("megatron_config", _asks, "Megatron's parallel layers are not supported"),
    ("target_parameters", _asks, "LoRA on bare parameters (fused experts) is not supported"),
    ("use_qalora", _asks, "QALoRA pools its inputs by quantisation group"),
    ("use_bdlora", _asks, "block-diagonal LoRA is not supported"),
    ("arrow_config", _asks, "Arrow routes between several adapters"),
    ("kasa_config", _asks, "KaSA changes the base's weights"),
    ("monteclora_config", _asks, "MonteCLoRA samples its weights"),
    ("loftq_config", _asks, "LoftQ changes the base's weights; save the adapter as plain LoRA"),
)
# Initialisations that leave the base as it is. The others subtract something from its weights, unless the adapter was
# saved as converted to plain LoRA, which peft then writes as `true`.
_HARMLESS_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
# Names of the output layer, which "all-linear" leaves out; BaseShape lists it, as it can be named.
_OUTPUT_LAYERS = ("lm_head", "embed_out", "output_layer")


@dataclass(frozen=True)
class PeftConfig:
    """A checked configuration. `targets` and `excluded` are a list of names or one regular expression."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]


def parse(raw: dict[str, Any]) -> PeftConfig:
    """The configuration. Raises `AdapterError`: `unsupported`, or `bad_config`, naming the key."""
    kind = raw.get("peft_type")
    if kind != "LORA":
        said = f"is {shown(kind)}" if kind is not None else "is missing"
        _unsupported("peft_type", f"peft_type {said}; only LORA is supported")
    for key, asks, why in _UNSUPPORTED:
        if asks(raw.get(key)):
            _unsupported(key, f"{key} is set, and that is not supported: {why}. Merge it into a base of its own")
    start = raw.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or start in _HARMLESS_INITIALISATIONS):
        _unsupported(
            "init_lora_weights",
            f"init_lora_weights is {shown(start)}, which may change the base's own weights; save the adapter again "
            "with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    targets = _names(raw, "target_modules")
    if not targets:
        _bad("target_modules", "target_modules is missing or empty; name the modules that the adapter changes")
    layers = raw.get("layers_to_transform")
    indices = (layers,) if type(layers) is int else tuple(_list(raw, "layers_to_transform", int))
    if indices and isinstance(targets, str):
        _bad("layers_to_transform", "layers_to_transform needs target_modules to be a list, not a pattern")
    pattern = raw.get("layers_pattern")
    layers_pattern = (pattern,) if isinstance(pattern, str) and pattern else tuple(_list(raw, "layers_pattern", str))
    if not all(re.fullmatch(r"[\w.]{1,128}", name, re.ASCII) for name in layers_pattern):
        _bad("layers_pattern", "layers_pattern is no name of a list of layers, such as `layers` or `h`")
    use_rslora = raw.get("use_rslora") or False
    if not isinstance(use_rslora, bool):
        _bad("use_rslora", f"use_rslora is {shown(use_rslora)} and not true or false")
    return PeftConfig(
        r=_rank("r", raw.get("r")),
        lora_alpha=_alpha("lora_alpha", raw.get("lora_alpha")),
        use_rslora=use_rslora,
        rank_pattern={key: _rank("rank_pattern", value) for key, value in _map(raw, "rank_pattern")},
        alpha_pattern={key: _alpha("alpha_pattern", value) for key, value in _map(raw, "alpha_pattern")},
        targets=targets,
        excluded=_names(raw, "exclude_modules"),
        layers=indices,
        layers_pattern=layers_pattern,
    )


class Matcher:
    """PEFT's rules for one configuration: which modules it adapts, with which rank and scaling."""

    def __init__(self, config: PeftConfig) -> None:
        self._config = config
        self._budget = Budget()
        self._all_linear = isinstance(config.targets, str) and config.targets.lower() == "all-linear"
        self._targets = self._names(config.targets, "target_modules")
        self._excluded = self._names(config.excluded, "exclude_modules")
        # Compiled by `re`: these patterns are plain names, which cannot make it slow.
        self._layer = [re.compile(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.") for pattern in config.layers_pattern] or [
            re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
        ]
        self._ranks = [
            (_ending_test(key, "rank_pattern", self._budget), rank) for key, rank in config.rank_pattern.items()
        ]
        self._alphas = [
            (_ending_test(key, "alpha_pattern", self._budget), alpha) for key, alpha in config.alpha_pattern.items()
        ]

    def targeted(self, module: str) -> bool:
        """Whether the configuration adapts the linear of this name."""
        if self._excluded(module):
            return False
        if self._all_linear:
            return module.rpartition(".")[2] not in _OUTPUT_LAYERS
        if not self._targets(module):
            return False
        config = self._config
        if not config.layers or module in config.targets:
            return True
        match = next((found for pattern in self._layer if (found := pattern.match(module))), None)
        return match is not None and int(match["idx"]) in config.layers

    def rank(self, module: str) -> int:
        """The rank of its LoRA, by `rank_pattern` or `r`."""
        return next((rank for fits, rank in self._ranks if fits(module)), self._config.r)

    def scaling(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732, section 3)."""
        rank = self.rank(module)
        alpha = next((alpha for fits, alpha in self._alphas if fits(module)), self._config.lora_alpha)
        return alpha / math.sqrt(rank) if self._config.use_rslora else alpha / rank

    def _names(self, names: tuple[str, ...] | str, key: str) -> Callable[[str], bool]:
        """A pattern that must match the whole name, or a list of names and endings."""
        if isinstance(names, str):
            return _pattern_test(names, key, self._budget, whole=True)
        wanted = frozenset(names)
        # A name fits by each of its endings after a dot.
        return lambda module: any(ending in wanted for ending in _endings(module))


def _pattern_test(pattern: str, key: str, budget: Budget, *, whole: bool) -> Callable[[str], bool]:
    """A test by a regular expression out of a file: of the whole name, or of a beginning of it."""

    def wrong(error: PatternError) -> NoReturn:
        _bad(key, f"{key} has a pattern that cannot be used, {shown(pattern)}: {error}; give a list of names")

    try:
        compiled = NamePattern(pattern, budget)
    except PatternError as error:
        wrong(error)

    def fits(module: str) -> bool:
        try:
            return compiled.fullmatch(module) if whole else compiled.match(module)
        except PatternError as error:
            wrong(error)

    return fits


def _ending_test(key: str, field: str, budget: Budget) -> Callable[[str], bool]:
    r"""peft's `re.match(rf"(.*\.)?({key})$", module)`; compared directly where the key is a plain name."""
    if not re.fullmatch(r"[\w.]{1,256}", key, re.ASCII):
        return _pattern_test(rf"(.*\.)?({key})$", field, budget, whole=False)

    def fits(module: str) -> bool:
        if module.endswith(key):
            return len(module) == len(key) or module[-len(key) - 1] == "."
        tail = module[-len(key) :]
        if "." not in key or len(tail) < len(key) or (len(module) > len(key) and module[-len(key) - 1] != "."):
            return False
        return all(k in (t, ".") for k, t in zip(key, tail, strict=True))  # in a pattern a dot is any character

    return fits


def _endings(module: str) -> Iterable[str]:
    yield module
    while (dot := module.find(".")) >= 0:
        module = module[dot + 1 :]
        yield module


def _names(raw: dict[str, Any], key: str) -> tuple[str, ...] | str:
    value = raw.get(key)
    return value if isinstance(value, str) else tuple(_list(raw, key, str))


def _list(raw: dict[str, Any], key: str, kind: type) -> list[Any]:
    value = raw.get(key)
    if value is None or value == "":
        return []
    if not isinstance(value, list) or len(value) > MAX_PATTERNS or not all(type(item) is kind for item in value):
        noun = "whole numbers" if kind is int else "names"
        _bad(key, f"{key} is neither a list of {noun} nor one of them")
    return value


def _map(raw: dict[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    value = raw.get(key)
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        _bad(key, f"{key} is no map from names to numbers")
    return value.items()


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        _bad(key, f"{key} has {shown(value)} for a rank; a rank is a whole number from 1 on", code="bad_rank")
    return value


def _alpha(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        _bad(key, f"{key} has {shown(value)} for an alpha; it is a finite number")
    return float(value)


def _bad(key: str, message: str, *, code: str = "bad_config") -> NoReturn:
    raise AdapterError(f"adapter_config.json: {message}", code=code, tensor=key)


def _unsupported(key: str, message: str) -> NoReturn:
    raise AdapterError(f"adapter_config.json: {message}", code="unsupported", tensor=key)
