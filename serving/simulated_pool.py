"""What a configuration says of its pool, as the simulation of policies wants it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from signalbox.experts.catalog import ExpertConfig, OpenAIExpert, Strict
from signalbox.experts.speed_model import SpeedModel
from signalbox.policies.base import Policy
from signalbox.policies.simulate import ExpertModel
from signalbox.policies.simulate_load import Arrival
from signalbox.serving.config import Config, ConfigError, Name
from signalbox.serving.config_source import ConfigSource, Problem, describe, nearest, read_yaml

# Of an engine that only its declared latency is known of: a guess, which `--speeds` replaces.
FURTHER_REQUEST = 0.1  # of a step's time that each further request adds
PROMPT_TOKENS = 100  # that the declared time to the first token is taken to read
PREFILL_TOKENS = 512
Model = TypeVar("Model", bound=Strict)
NOT_SIMULATED = ("budget", "rate", "intents", "parallel", "explore")


class EngineSpeed(Strict):
    """One engine's measured speed: an entry of a speeds file, as `benchmarks.sla` writes it."""

    prefill_tokens_per_s: float = Field(gt=0, description="prompt tokens read a second")
    step_ms: float = Field(gt=0, description="a step of one request, milliseconds")
    step_ms_per_request: float = Field(0.0, ge=0, description="what each further request adds to a step")
    prefill_tokens: int = Field(PREFILL_TOKENS, ge=1, description="most prompt tokens read in a step")
    jitter: float = Field(0.0, ge=0, lt=1, description="relative standard deviation of a step's time")
    overhead_ms: float = Field(0.0, ge=0, description="what gateway and network add to each request")
    bytes_per_token: float | None = Field(None, gt=0, description="bytes of a prompt's text for each of its tokens")

    def model(self) -> SpeedModel:
        """Without what is beside the engine."""
        return SpeedModel(
            self.prefill_tokens_per_s, self.step_ms, self.step_ms_per_request, self.prefill_tokens, self.jitter
        )


def read_speeds(path: Path) -> dict[str, EngineSpeed]:
    """A YAML or JSON file, expert -> speed. Raises `ConfigError`."""
    return _read(path, set(), EngineSpeed)


def read_policies(path: Path) -> dict[str, Policy]:
    """A YAML or JSON file, name -> policy, with or without `policies:` around them. Raises `ConfigError`."""
    return _read(path, {"policies"}, Policy)


def _read(path: Path, around: set[str], model: type[Model]) -> dict[str, Model]:
    source = read_yaml(path)
    if set(source.data) == around:
        (key,) = around
        inner = source.data[key]
        lines = {place[1:]: line for place, line in source.lines.items() if len(place) > 1}
        source = ConfigSource(source.file, inner if isinstance(inner, dict) else {}, lines)
    try:
        return TypeAdapter(dict[Name, model]).validate_python(source.data)  # type: ignore[valid-type]
    except ValidationError as error:
        problems = []
        for item in error.errors(include_url=False):
            name = str(item["loc"][0])
            inside = ConfigSource(source.file, source.data[name] if isinstance(source.data[name], dict) else {})
            found = describe(model, inside, dict(item) | {"loc": item["loc"][1:]})
            problems.append(Problem((name, *found.path), found.text))
        raise ConfigError(source.messages(problems)) from None


def simulated_pool(
    config: Config, speeds: Mapping[str, EngineSpeed], qualities: Mapping[str, tuple[float, float]]
) -> tuple[list[ExpertModel], list[str]]:
    """The routable experts, and what is only guessed or left out, in words.

    A simulated engine's speed stands in its configuration; another's is taken from `speeds`, or guessed from its
    declared latency. `qualities` are means and standard deviations of predicted qualities.

    Raises `ConfigError` where a name is no expert's.
    """
    for name in (*speeds, *qualities):
        if name not in config.experts:
            raise ConfigError([f"there is no expert '{name}'; {nearest(name, list(config.experts))}"])
    found, warnings, guessed = [], [], []
    for name, expert in config.experts.items():
        if not expert.routable:
            continue
        speed = speeds.get(name)
        if speed is None and expert.engine != "simulated":
            guessed.append(name)
        found.append(
            ExpertModel(
                name=name,
                speed=speed.model() if speed is not None else _speed_of(expert),
                price=expert.price,
                max_running=expert.max_running,
                max_waiting=expert.max_waiting,
                replicas=1 if isinstance(expert, OpenAIExpert) else expert.replicas,
                bytes_per_token=(speed.bytes_per_token if speed is not None else None) or expert.bytes_per_token,
                context_length=expert.context_length,
                parameters=expert.parameters,
                quality=qualities.get(name, (0.5, 0.0)),
                overhead_ms=speed.overhead_ms if speed is not None else 0.0,
            )
        )
    if guessed:
        warnings.append(
            f"the speed of {', '.join(guessed)} is guessed from the declared latency, each further request of a batch "
            f"taken to add {FURTHER_REQUEST:.0%} to a step: measure it, and give --speeds"
        )
    if config.adapters:
        warnings.append("adapters are not simulated")
    return found, warnings


def _speed_of(expert: ExpertConfig) -> SpeedModel:
    if expert.engine == "simulated":
        return expert.speed_model()
    latency = expert.latency
    reading_ms = max(1.0, latency.ttft_ms - latency.tpot_ms)
    return SpeedModel(
        prefill_tokens_per_s=1000 * PROMPT_TOKENS / reading_ms,
        step_ms=latency.tpot_ms,
        step_ms_per_request=FURTHER_REQUEST * latency.tpot_ms,
        prefill_tokens=PREFILL_TOKENS,
    )


def left_out(policies: Mapping[str, Policy]) -> list[str]:
    """What these policies ask for and the simulation does not do, in words."""
    plain = Policy()
    found = {key: [n for n, p in policies.items() if getattr(p, key) != getattr(plain, key)] for key in NOT_SIMULATED}
    return [f"`{key}` of {', '.join(names)} is not simulated" for key, names in found.items() if names]


def with_predictions(load: Sequence[Arrival], config: Config) -> tuple[list[Arrival], float]:
    """The load with the default router's prediction for each prompt that has none, and the router's spread.

    Without a router, or without prompts, the load as it is. Imports and loads the predictor: takes seconds.
    Raises `ArtifactError`.
    """
    router = config.routers.get(config.default_router)
    wanted = [i for i, arrival in enumerate(load) if arrival.prompt is not None and arrival.quality is None]
    if router is None or not wanted:
        return list(load), 1.0
    from signalbox.router.base import Prompt
    from signalbox.serving.routing import load_artifact

    predictor = load_artifact(router.artifact, router.wanted)
    found = list(load)
    spread = 1.0
    for first in range(0, len(wanted), 32):
        part = wanted[first : first + 32]
        prediction = predictor.predict([Prompt(load[i].prompt or "") for i in part])
        spread = prediction.spread
        for row, i in enumerate(part):
            quality = {name: min(1.0, max(0.0, mean)) for name, (mean, _) in prediction.row(row).items()}
            found[i] = load[i].model_copy(update={"quality": quality})
    return found, spread
