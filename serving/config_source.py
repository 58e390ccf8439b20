"""Where a configuration's values came from, so that every complaint names file, line, key and a remedy."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

KeyPath = tuple[str | int, ...]

ENV_PREFIX = "SIGNALBOX__"


class ConfigError(Exception):
    """The configuration cannot be used; `messages` has one line for each problem."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


@dataclass(slots=True, frozen=True)
class Problem:
    """What is wrong at a place of the configuration, or (`variable`) with an override that found no place."""

    path: KeyPath
    text: str
    variable: str | None = None


@dataclass(slots=True)
class ConfigSource:
    """Parsed YAML, with the line of every key and the environment variables that replaced values."""

    file: Path
    data: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def messages(self, problems: Iterable[Problem]) -> list[str]:
        """One line for each problem, in the order of the file."""
        placed = sorted(((self._line(problem.path), self._message(problem)) for problem in problems), key=itemgetter(0))
        return list(dict.fromkeys(message for _, message in placed))

    def _message(self, problem: Problem) -> str:
        """`FILE:LINE: KEY: text`, or the environment variable in FILE:LINE's place where that set the value."""
        if problem.variable:
            return f"{problem.variable}: {problem.text}"
        variable = next((v for path, v in self.overrides.items() if problem.path[: len(path)] == path), None)
        place = variable or f"{self.file}:{self._line(problem.path)}"
        return ": ".join([place, *([dotted(problem.path)] if problem.path else []), problem.text])

    def _line(self, path: KeyPath) -> int:
        """Line of the place, or of the nearest enclosing one that was written down."""
        return next((self.lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.lines), 1)


def dotted(path: KeyPath) -> str:
    """`experts.gemma.price`."""
    return ".".join(str(part) for part in path)


def read_yaml(file: Path) -> ConfigSource:
    """Parse with line marks; duplicate and non-string keys are errors. Raises `ConfigError`."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{file}: there is no such file"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{file}: is not UTF-8 text"]) from None
    except OSError as error:
        raise ConfigError([f"{file}: cannot be read: {error.strerror}"]) from None
    return parse_yaml(text, file)


def parse_yaml(text: str, file: Path) -> ConfigSource:
    """As `read_yaml`, of a text that came from elsewhere; `file` is what messages call it."""
    try:
        loader = yaml.SafeLoader(text)
    except yaml.YAMLError as error:  # a character that no YAML may have
        raise ConfigError([f"{file}: not valid YAML: {str(error).splitlines()[0]}"]) from None
    try:
        root = loader.get_single_node()
        source = ConfigSource(file, {})
        if root is None:
            raise ConfigError([f"{file}:1: the file is empty"])
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                [f"{file}:{root.start_mark.line + 1}: must be a mapping with sections such as `experts:`"]
            )
        problems: list[str] = []
        _walk(root, (), source, problems, ())
        if problems:
            raise ConfigError(problems)
        source.data = _unshared(loader.construct_document(root))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError([f"{file}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}"]) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        raise ConfigError([f"{file}: not valid YAML: {error}"]) from None
    except RecursionError:
        raise ConfigError([f"{file}: not valid YAML: it is nested too deeply"]) from None
    finally:
        loader.dispose()
    return source


def _walk(
    node: yaml.Node, path: KeyPath, source: ConfigSource, problems: list[str], above: tuple[yaml.Node, ...]
) -> None:
    """Note the line of every key below `node`; an inherited key (`<<`) counts where it was written first."""
    if any(node is ancestor for ancestor in above):
        problems.append(f"{source.file}:{node.start_mark.line + 1}: an alias that contains itself")
        return
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            source.lines.setdefault((*path, index), item.start_mark.line + 1)
            _walk(item, (*path, index), source, problems, above)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in sorted(node.value, key=lambda pair: pair[0].tag == "tag:yaml.org,2002:merge"):
        line = key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            for parent in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _walk(parent, path, source, problems, above)
            continue
        where = dotted((*path, key.value if isinstance(key.value, str) else "?"))
        if key.tag != "tag:yaml.org,2002:str":
            problems.append(f"{source.file}:{line}: {where}: YAML reads this key as something else; put it in quotes")
        elif key.value in seen:
            problems.append(f"{source.file}:{line}: {where}: given twice, first on line {seen[key.value]}")
        else:
            seen[key.value] = line
            source.lines.setdefault((*path, key.value), line)
            _walk(value, (*path, key.value), source, problems, above)


def _unshared(value: Any) -> Any:
    """A copy in which no two places are one object (aliases are), so that an override changes one place alone."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def apply_overrides(model: type[BaseModel], source: ConfigSource, environment: Mapping[str, str]) -> list[Problem]:
    """Put the values of `SIGNALBOX__SECTION__KEY` variables (YAML) into `source.data`; returns what did not fit.

    Names are compared without case, and '-' and '.' of a configured name are written '_', as shells want it.
    """
    problems = []
    for variable in sorted(name for name in environment if name.upper().startswith(ENV_PREFIX)):
        try:
            _override(model, source, variable, environment[variable])
        except LookupError as error:
            problems.append(Problem((), error.args[0], variable))
        except (yaml.YAMLError, ValueError):  # never the value itself: it may be a secret
            problems.append(Problem((), "its value is not valid YAML", variable))
    return problems


def _override(model: type[BaseModel], source: ConfigSource, variable: str, text: str) -> None:
    value = yaml.safe_load(text)
    annotation, target, path = model, source.data, ()  # type: Any, Any, KeyPath
    parts = variable[len(ENV_PREFIX) :].split("__")
    for part in parts:
        known = keys_at(annotation, target) if isinstance(target, dict) else []
        found = [key for key in known if _fold(key) == _fold(part)]
        if len(found) != 1:
            where = f" in {dotted(path)}" if path else ""
            hint = f"it could be any of {', '.join(found)}" if found else nearest(part.lower(), known)
            raise LookupError(f"no single key '{part.lower()}'{where}; {hint}")
        path = (*path, found[0])
        annotation = annotation_at(annotation, found[0], target)
        if len(path) == len(parts):
            target[found[0]] = value
        elif target.get(found[0]) is None and keys_at(annotation, {}):
            target[found[0]] = {}  # a section that the file leaves out
        target = target.get(found[0])
    source.overrides[path] = variable


def _fold(key: str) -> str:
    return key.lower().replace("-", "_").replace(".", "_")


def describe(model: type[BaseModel], source: ConfigSource, error: Mapping[str, Any]) -> Problem:
    """A pydantic error as a problem: its place in the file, and what to do."""
    annotation, data, path = model, source.data, ()  # type: Any, Any, KeyPath
    place, kind, context = list(error["loc"]), error["type"], error.get("ctx", {})
    while place:
        part = place.pop(0)
        if len(_models(annotation)) > 1:  # pydantic names the chosen member of a union here
            annotation = next(iter(_models(annotation, data)))
        elif isinstance(data, dict) and part in data:
            if place or kind != "extra_forbidden":
                annotation, data = annotation_at(annotation, str(part), data), data[part]
            path = (*path, part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data, path = data[part], (*path, part)
        elif kind == "missing" and not place:
            path = (*path, part)
    if kind == "extra_forbidden":
        return Problem(path, "unknown key; " + nearest(str(path[-1]), keys_at(annotation, data)))
    if kind == "missing":
        return Problem(path, "must be given" + _hint(annotation, str(path[-1])))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, context["discriminator"].strip("'"))
        known = [tag.strip(" '") for tag in context.get("expected_tags", "").split(",") if tag] or _tags(annotation)
        text = f"'{context['tag']}' is unknown; " if "tag" in context else "must be given; "
        return Problem(path, text + nearest(str(context.get("tag", "")), known))
    if kind == "literal_error":
        return Problem(path, f"must be {context['expected']}, not '{error['input']}'")
    if kind == "value_error":
        return Problem(path, str(context["error"]))
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return Problem(path, f"must have {bound} entries, not {context['actual_length']}")
    if kind in ("tuple_type", "list_type"):
        return Problem(path, "must be a list: [one, two]")
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return Problem(path, "must be a mapping: {key: value}")
    text = error["msg"].replace("Input should be", "must be").replace("Input should", "must")
    return Problem(path, text[0].lower() + text[1:])


def nearest(key: str, known: list[str]) -> str:
    """`did you mean 'price'?`, or the list of what there is."""
    close = difflib.get_close_matches(key.lower(), [k.lower() for k in known], n=1, cutoff=0.6)
    if close:
        return f"did you mean '{next(k for k in known if k.lower() == close[0])}'?"
    return f"known: {', '.join(known)}" if known else "no keys belong here"


def keys_at(annotation: Any, data: Any) -> list[str]:
    """The keys that may stand here: a model's fields, or the names in a mapping."""
    models = _models(annotation, data)
    if not models:
        return [key for key in data if isinstance(key, str)] if get_origin(annotation) is dict else []
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def annotation_at(annotation: Any, key: str, data: Any) -> Any:
    """The type of the value under `key`."""
    for model in _models(annotation, data):
        if key in model.model_fields:
            return model.model_fields[key].annotation
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def _models(annotation: Any, data: Any = None) -> list[type[BaseModel]]:
    """The models that `annotation` allows: of a union with a discriminator, the one that `data` names, if it does."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0], data)
    if get_origin(annotation) not in (Union, types.UnionType):
        return []
    members = [model for argument in get_args(annotation) for model in _models(argument)]
    if isinstance(data, dict):
        named = [m for m in members if any(data.get(f) in tags for f, tags in _literals(m).items())]
        return named or members
    return members


def _literals(model: type[BaseModel]) -> dict[str, tuple[Any, ...]]:
    return {
        name: get_args(field.annotation)
        for name, field in model.model_fields.items()
        if get_origin(field.annotation) is Literal and field.is_required()
    }


def _tags(annotation: Any) -> list[str]:
    return [tag for model in _models(annotation) for tags in _literals(model).values() for tag in tags]


def _hint(annotation: Any, key: str) -> str:
    for model in _models(annotation):
        if key in model.model_fields and model.model_fields[key].description:
            return f": {model.model_fields[key].description}"
    return ""
