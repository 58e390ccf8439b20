"""`signalbox policy ...`: policies in files, and those of a running service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import orjson
import typer
import yaml
from rich.markup import escape

from signalbox.serving.cli_policy_plan import plan_command
from signalbox.serving.cli_simulate import simulate_command
from signalbox.serving.service_client import (
    DEFAULT_URL,
    ServiceError,
    Url,
    checked,
    console,
    fail,
    messages,
    plain_table,
    service,
    time_of,
)

policy_app = typer.Typer(
    name="policy", help="Check, apply, show, roll back, plan and simulate policies.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="the policy's name")]
File = Annotated[Path, typer.Argument(help="YAML or JSON: one policy, or several under `policies:`")]
AsName = Annotated[str | None, typer.Option("--name", help="name of a file's only policy; default: the file's name")]
IfMatch = Annotated[
    str | None, typer.Option(metavar="ETAG", help="only where this is what is in force (as `show` tells it)")
]
PoolOf = Annotated[Path | None, typer.Option("--config", help="configuration whose experts the policies must fit")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, as the service gives it")]


@policy_app.command("check")
def check_command(file: File, name: AsName = None, config: PoolOf = None) -> None:
    """Check a file of policies here, without a service; exit code 1 with every problem: file, line and key."""
    policies = _read(file, name, config)
    many = "1 policy" if len(policies) == 1 else f"{len(policies)} policies"
    console.print(f"{file}: {many} ({', '.join(policies)}). No problem found.", markup=False, soft_wrap=True)


@policy_app.command("apply")
def apply_command(
    file: File, name: AsName = None, if_match: IfMatch = None, config: PoolOf = None, url: Url = DEFAULT_URL
) -> None:
    """Put a file's policies in force, and say of each whether it was created, changed or unchanged."""
    policies = _read(file, name, config)
    if if_match is not None and len(policies) > 1:
        fail(f"--if-match is for one policy; {file} has {len(policies)}")
    with service(url) as client:
        for key, policy in policies.items():
            before = client.get(_path(key))
            known = None if before.status_code == 404 else checked(before)["etag"]
            reply = client.put(_path(key), json=policy, headers=_condition(if_match))
            record = checked(reply)
            if reply.status_code == 201:
                said = "created"
            else:
                said = "unchanged" if record["etag"] == known else "changed"
            console.print(f"{key}: {said} (version {record['version']}, ETag {record['etag']})", markup=False)


@policy_app.command("list")
def list_command(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Show the policies in force."""
    with service(url) as client:
        body = checked(client.get("/v1/policies"))
    if as_json:
        print(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode())
        return
    if not body["data"]:
        console.print("No policies. `signalbox policy apply FILE` puts one in force.", markup=False)
        return
    _show_records(body["data"], "policy")


@policy_app.command("show")
def show_command(
    name: Name,
    version: Annotated[int | None, typer.Option(min=1, help="an older version")] = None,
    history: Annotated[bool, typer.Option("--history", help="the last versions, one a line")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Show a policy as YAML, fit for `apply`; or its history."""
    with service(url) as client:
        if history or version is not None:
            body = checked(client.get(_path(name, "/versions")))
        else:
            body = checked(client.get(_path(name)))
    if version is not None:
        found = next((r for r in body["data"] if r["version"] == version), None)
        if found is None:
            fail(f"policy '{name}' has no version {version}; there are: {_numbers(body['data'])}")
        body = found
    if as_json:
        print(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode())
    elif body.get("object") == "list":
        _show_records(body["data"], "version")
    else:
        state = "deleted" if body["deleted"] else body["note"]
        print(f"# {name}, version {body['version']}, {time_of(body['updated_at'])}: {state}; ETag {body['etag']}")
        print(yaml.safe_dump(body["policy"], sort_keys=False, allow_unicode=True), end="")


@policy_app.command("rollback")
def rollback_command(
    name: Name,
    version: Annotated[int, typer.Argument(min=1, help="the version to go back to; `show NAME --history` has them")],
    if_match: IfMatch = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Put an old version in force again, as a new one; a deleted policy comes back."""
    with service(url) as client:
        reply = client.post(_path(name, "/rollback"), json={"version": version}, headers=_condition(if_match))
        record = checked(reply)
    console.print(
        f"{name}: version {record['version']} is what version {version} was (ETag {record['etag']})", markup=False
    )


@policy_app.command("delete")
def delete_command(name: Name, if_match: IfMatch = None, url: Url = DEFAULT_URL) -> None:
    """Take a policy out of force; its history stays, and `rollback` brings it back."""
    with service(url) as client:
        reply = client.delete(_path(name), headers=_condition(if_match))
        if reply.status_code != 204:
            checked(reply)
            raise ServiceError({"message": f"{url} answered {reply.status_code}; is it a Signalbox?"})
    console.print(f"{name}: deleted", markup=False)


policy_app.command("plan")(plan_command)
policy_app.command("simulate")(simulate_command)


# What the commands stand on


def _path(name: str, action: str = "") -> str:
    """The policy's path; a name with a slash stays one name, and is then refused as one."""
    return f"/v1/policies/{quote(name, safe='')}{action}"


def _condition(if_match: str | None) -> dict[str, str]:
    """The header; the quotes, which a shell takes off, are put back."""
    if if_match is None:
        return {}
    return {"if-match": if_match if if_match == "*" or if_match.startswith(('"', "W/")) else f'"{if_match}"'}


def _read(file: Path, name: str | None, config: Path | None) -> dict[str, dict[str, Any]]:
    """The file's policies by name, in plain types; ends with exit code 1 and every problem where it has one."""
    from signalbox.experts.base import InvalidRequest
    from signalbox.serving.config_source import ConfigError, KeyPath, Problem, read_yaml
    from signalbox.serving.policy_check import check_policy, read_policy
    from signalbox.serving.policy_table import check_name

    experts = _experts(config) if config is not None else None
    try:
        source = read_yaml(file)  # JSON is YAML
    except ConfigError as error:
        fail("\n".join(error.messages))
    several = source.data.get("policies")
    if "policies" not in source.data:
        found = {name or file.stem: source.data}
    elif name is not None:
        fail(f"--name is for a file with one policy; {file} has `policies:`")
    elif not isinstance(several, dict) or not several:
        fail(f"{file}: policies: must be a mapping of names to policies")
    else:
        found = several
    problems: list[Problem] = []
    warnings: list[Problem] = []
    for key, value in found.items():
        place: KeyPath = ("policies", key) if found is several else ()
        try:
            check_name(key)
        except InvalidRequest as error:
            problems.append(Problem(place, error.message))
        policy, wrong = read_policy(value)
        odd: list[Problem] = []
        if policy is not None:
            findings = check_policy(policy, experts)
            wrong, odd = findings.problems, findings.warnings
        problems += [Problem((*place, *p.path), p.text) for p in wrong]
        warnings += [Problem((*place, *p.path), p.text) for p in odd]
    if problems:
        fail("\n".join(source.messages(problems)))
    for warning in source.messages(warnings):
        messages.print(f"warning: {warning}", markup=False, style="yellow")
    return found


def _experts(config: Path) -> list[str]:
    """All names of the configuration's experts, adapters' long and short ones among them."""
    from signalbox.serving.config import ConfigError, load_config

    try:
        loaded = load_config(config, on_warning=lambda _: None)
    except ConfigError as error:
        fail("\n".join(error.messages))
    adapters = [full for name, adapter in loaded.adapters.items() for full in (f"{adapter.base}:{name}", name)]
    return [*loaded.experts, *adapters]


def _show_records(records: list[dict[str, Any]], first: str) -> None:
    table = (
        plain_table("policy", ">version", "since", "from", "says")
        if first == "policy"
        else plain_table(">version", "since", "from", "says")
    )
    for record in records:
        says = "deleted" if record["deleted"] else ", ".join(_flat(record["policy"])) or "(nothing but what is usual)"
        row = [str(record["version"]), time_of(record["updated_at"]), escape(record["note"]), escape(says)]
        table.add_row(*([escape(record["name"]), *row] if first == "policy" else row))
    console.print(table)


def _flat(value: Any, path: str = "") -> list[str]:
    """`slo.max_ttft_ms 800`, one for each thing that is said; long lists by their length."""
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in _flat(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list):
        value = " ".join(map(str, value)) if len(value) <= 4 else f"({len(value)})"
    return [f"{path} {value:g}" if isinstance(value, float) else f"{path} {value}"]


def _numbers(records: list[dict[str, Any]]) -> str:
    return ", ".join(str(record["version"]) for record in records)
