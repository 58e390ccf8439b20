"""The configuration: what is read, what is overridden, and that every complaint names line, key and remedy."""

# ruff: noqa: E501 (tables of messages, each on one line as it is printed)
from __future__ import annotations

import json
from pathlib import Path

import pytest

from signalbox.experts.catalog import EsftServing, VllmExpert
from signalbox.serving.config import Config, ConfigError, adapter_limits, load_config, missing_environment

MINIMAL = """\
experts:
  remote: {engine: openai, base_url: "http://127.0.0.1:9/v1", model: x}
"""
QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart.yaml"


def write(folder: Path, text: str) -> Path:
    file = folder / "signalbox.yaml"
    file.write_text(text)
    return file


def complaints(file: Path, **environment: str) -> list[str]:
    """Messages of the `ConfigError`, without the file's folder."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, environment=environment)
    assert str(caught.value) == "\n".join(caught.value.messages)
    return [message.replace(f"{file.parent}/", "") for message in caught.value.messages]


def load(file: Path, **environment: str) -> Config:
    return load_config(file, environment=environment, on_warning=lambda _: None)


def test_the_quickstart_file_is_valid() -> None:
    config = load(QUICKSTART)
    assert set(config.experts) == {"smollm2", "gemma"}
    smollm2, gemma = config.experts["smollm2"], config.experts["gemma"]
    assert smollm2.price.input < gemma.price.input and smollm2.price.output < gemma.price.output
    assert set(config.policies) == {"gold", "bronze"}
    assert config.routers["default"].artifact == QUICKSTART.parents[1] / "routers" / "quickstart"
    assert config.server.host == "127.0.0.1"


def test_the_quickstart_chat_template_makes_a_page_of_questions_and_answers() -> None:
    import jinja2.sandbox

    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(
        load(QUICKSTART).experts["gemma"].chat_template  # type: ignore[union-attr]
    )
    turns = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4\n"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    text = template.render(messages=turns, bos_token="<bos>", add_generation_prompt=True)
    assert text == "<bos>Be brief.\n\nQuestion: What is 2 + 2?\nAnswer: 4\n\nQuestion: And 3 + 3?\nAnswer:"


def test_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL))
    assert (config.server.host, config.server.port, config.store.url) == ("127.0.0.1", 8000, "embedded")
    assert config.default_policy is None and config.default_router == "default"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("server: {prot: 1}", "3: server.prot: unknown key; did you mean 'port'?"),
        ("server: {port: 70000}", "3: server.port: must be less than or equal to 65535"),
        ("server: {port: many}", "3: server.port: must be a valid integer, unable to parse string as an integer"),
        (
            "server: {host: 0.0.0.0}",
            "3: server.host: 0.0.0.0 is reachable from outside this machine: set server.api_key_env, or declare keys",
        ),
        ("server: {host: example.org}", "3: server.host: must be an IPv4 address such as 127.0.0.1"),
        ("server:", "3: server: must be a mapping: {key: value}"),
        ("polices: {}", "3: polices: unknown key; did you mean 'policies'?"),
        (
            "store: {url: 'http://:secret@host'}",
            "3: store.url: must be 'embedded' or start with redis://, rediss:// or unix://",
        ),
        (
            "store: {url: 'redis://host', data_dir: x}",
            "3: store: data_dir is for url: embedded; another server keeps its data itself",
        ),
        ("cache: {ttl_s: 0}", "3: cache.ttl_s: must be greater than or equal to 1"),
        ("policies: {gold: {cache: semantic}}", "3: policies.gold.cache: must be 'off' or 'exact', not 'semantic'"),
        ("policies: {gold: {slo: {max_tft_ms: 3}}}", "3: policies.gold.slo.max_tft_ms: unknown key; did you mean 'max_ttft_ms'?"),
        ("policies: {gold: {allowed: gpt}}", "3: policies.gold.allowed: must be a list: [one, two]"),
        ("policies: {gold: {fallback: -1}}", "3: policies.gold.fallback: must be greater than or equal to 0"),
        ("policies: {auto: {}}", "3: policies.auto: 'auto' is the name that asks the router to choose; call this one something else"),
        ("default_policy: glod", "3: default_policy: there is no policy 'glod'; no policy is declared"),
        ("default_router: main", "3: default_router: there is no router 'main'; no router is declared"),
        ("routers: {default: {kind: tryage}}", "3: routers.default.artifact: must be given: folder with router.json and router.safetensors"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_line_and_remedy(tmp_path: Path, line: str, message: str) -> None:
    assert complaints(write(tmp_path, MINIMAL + line + "\n")) == [f"signalbox.yaml:{message}"]


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ("{engine: opneai, model: x}", "engine: 'opneai' is unknown; did you mean 'openai'?"),
        ("{model: x}", "engine: must be given; known: transformers, vllm, openai, simulated"),
        ("{engine: openai, model: x}", "base_url: must be given: address up to and with the version, e.g. https://api.openai.com/v1"),
        ("{engine: openai, model: x, base_url: ftp://x}", "base_url: must start with http:// or https://"),
        ("{engine: openai, model: x, base_url: http://x, pricee: {}}", "pricee: unknown key; did you mean 'price'?"),
        ("{engine: openai, model: x, base_url: http://x, price: {inptu: 1}}", "price.inptu: unknown key; did you mean 'input'?"),
        ("{engine: openai, model: x, base_url: http://x, price: {input: -1}}", "price.input: must be greater than or equal to 0"),
        ("{engine: transformers, model: ./none}", "model: there is no such file or folder ({folder}/none); a model is `pypi:PACKAGE`, `hf:ORG/NAME` or a path"),
    ],
)  # fmt: skip
def test_a_wrong_expert_is_named_with_line_and_remedy(tmp_path: Path, expert: str, message: str) -> None:
    file = write(tmp_path, f"{MINIMAL}  other:\n    {expert}\n")
    wanted = message.replace("{folder}/", "")
    assert [c.split(": ", 1)[1] for c in complaints(file)] == [f"experts.other.{wanted}"]
    assert all(c.startswith(("signalbox.yaml:3:", "signalbox.yaml:4:")) for c in complaints(file))


@pytest.mark.parametrize("name", ["a b", "a/b", "-x", "x" * 65, "AUTO", "a:b", ""])
def test_an_expert_cannot_be_called_that(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, f'experts:\n  "{name}": {{engine: openai, base_url: "http://x", model: x}}\n')
    assert len(complaints(file)) == 1 and complaints(file)[0].startswith(f"signalbox.yaml:2: experts.{name}: ")


def test_all_problems_come_at_once_and_in_order(tmp_path: Path) -> None:
    file = write(
        tmp_path, "polices: {}\nexperts:\n  a: {engine: openai, model: x}\n  b: {engine: x}\nserver: {port: -1}\n"
    )
    assert [message.split(":")[1] for message in complaints(file)] == ["1", "3", "4", "5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "signalbox.yaml:1: the file is empty"),
        ("- a\n", "signalbox.yaml:1: must be a mapping with sections such as `experts:`"),
        ("a: [\n", "signalbox.yaml:2: not valid YAML: expected the node content, but found '<stream end>'"),
        ("experts:\n  a: {}\n  a: {}\n", "signalbox.yaml:3: experts.a: given twice, first on line 2"),
        ("experts:\n  1: {}\n", "signalbox.yaml:2: experts.1: YAML reads this key as something else; put it in quotes"),
        ("a: &a [*a]\n", "signalbox.yaml:1: an alias that contains itself"),
        ("a: !!python/object/apply:os.system [ls]\n", "signalbox.yaml:1: not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("experts: {}\n", "signalbox.yaml:1: experts: must have at least 1 entries, not 0"),
        ("server: {}\n", "signalbox.yaml:1: experts: must be given: the pool, by name"),
        (MINIMAL.replace("model: x", "model: x, routable: false"), "signalbox.yaml:1: experts: no expert is routable, so `auto` has nothing to choose from"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    assert complaints(write(tmp_path, text)) == [message]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert complaints(tmp_path / "none.yaml") == ["none.yaml: there is no such file"]
    assert "cannot be read" in complaints(tmp_path)[0]


def test_anchors_share_values_and_keep_their_lines(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        'experts:\n  a: &a\n    engine: openai\n    base_url: "http://x"\n    model: x\n    pric: {}\n'
        "  b:\n    <<: *a\n    model: y\n",
    )
    assert complaints(file) == [
        "signalbox.yaml:6: experts.a.pric: unknown key; did you mean 'price'?",
        "signalbox.yaml:6: experts.b.pric: unknown key; did you mean 'price'?",
    ]
    file.write_text(file.read_text().replace("    pric: {}\n", ""))
    config = load(file, SIGNALBOX__EXPERTS__A__PRICE="{input: 1}")
    assert (config.experts["a"].model, config.experts["b"].model) == ("x", "y")
    assert (config.experts["a"].price.input, config.experts["b"].price.input) == (1, 0)


def test_environment_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL + '  gpt-4.1: {engine: openai, base_url: "http://x", model: x}\n')
    config = load(
        file,
        SIGNALBOX__STORE__URL="redis://:pw@host/1",
        signalbox__server__PORT="9000",
        SIGNALBOX__EXPERTS__GPT_4_1__PRICE="{input: 2, output: 3}",
        SIGNALBOX__EXPERTS__REMOTE__ROUTABLE="false",
        SIGNALBOX_LOG_LEVEL="DEBUG",
        UNRELATED="1",
    )
    assert (config.store.url, config.server.port) == ("redis://:pw@host/1", 9000)
    assert config.experts["gpt-4.1"].price.output == 3 and not config.experts["remote"].routable
    assert "pw" not in repr(config)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("STORE__URLL", "x", "no single key 'urll' in store; did you mean 'url'?"),
        ("STOR__URL", "x", "no single key 'stor'; did you mean 'store'?"),
        ("EXPERTS__GPT__MODEL", "x", "no single key 'gpt' in experts; known: remote"),
        ("SERVER__PORT__X", "1", "no single key 'x' in server.port; no keys belong here"),
        ("SERVER__PORT", "[secret", "its value is not valid YAML"),
        ("SERVER__PORT", "many", "server.port: must be a valid integer"),
        ("STORE__URL", "http://:secret@x", "store.url: must be 'embedded'"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, variable: str, value: str, message: str) -> None:
    found = complaints(write(tmp_path, MINIMAL), **{f"SIGNALBOX__{variable}": value})
    assert len(found) == 1 and found[0].startswith(f"SIGNALBOX__{variable}: {message}") and "secret" not in found[0]


def test_names_that_look_alike_cannot_be_overridden(tmp_path: Path) -> None:
    expert = '{engine: openai, base_url: "http://x", model: x}'
    file = write(tmp_path, f"experts:\n  a-b: {expert}\n  a.b: {expert}\n")
    assert complaints(file, SIGNALBOX__EXPERTS__A_B__MODEL="y") == [
        "SIGNALBOX__EXPERTS__A_B__MODEL: no single key 'a_b' in experts; it could be any of a-b, a.b"
    ]


def test_paths_start_at_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    folder = tmp_path / "conf"
    folder.mkdir()
    file = write(
        folder,
        "store: {data_dir: ../state}\n"
        "experts:\n  a: {engine: transformers, model: ../model}\n  b: {engine: transformers, model: pypi:x}\n"
        "routers: {default: {kind: tryage, artifact: ./router}}\n",
    )
    monkeypatch.chdir("/")
    config = load(file)
    assert config.experts["a"].model == str(tmp_path / "model")
    assert config.experts["b"].model == "pypi:x"
    assert config.routers["default"].artifact == folder / "router"
    assert config.store.data_dir == tmp_path / "state"


def test_artifacts_are_checked_when_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL + "routers: {default: {kind: tryage, artifact: r}}\n")
    load(file)

    def problem() -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(file, environment={}, check_artifacts=True)
        return str(caught.value)

    assert problem().startswith(f"{file}:3: routers.default.artifact: there is no router in {tmp_path}/r; ")
    assert "make router-quickstart" in problem()
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "router.json").write_text("{")
    assert "cannot be read" in problem()
    (tmp_path / "r" / "router.json").write_text(json.dumps({"kind": "knn"}))
    assert "is of kind 'knn', not 'tryage'" in problem()
    (tmp_path / "r" / "router.json").write_text(json.dumps({"kind": "tryage"}))
    load_config(file, environment={}, check_artifacts=True)
    for kind in ("", "kind: best, "):  # whichever was trained
        write(tmp_path, MINIMAL + f"routers: {{default: {{{kind}artifact: r}}}}\n")
        assert load_config(file, environment={}, check_artifacts=True).routers["default"].wanted is None


def test_odd_but_usable_is_a_warning(tmp_path: Path) -> None:
    file = write(tmp_path, MINIMAL + "policies:\n  gold: {allowed: [gpt-*, remote]}\n")
    warnings: list[str] = []
    load_config(file, environment={}, on_warning=warnings.append)
    assert warnings == [
        f"{file}:1: routers: no router is declared: `auto` goes by price and latency alone",
        f"{file}:4: policies.gold.allowed: 'gpt-*' fits none of the experts; known: remote",
    ]


def test_missing_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = MINIMAL.replace("model: x", "model: x, api_key_env: SBX_TEST_A") + "server: {api_key_env: SBX_TEST_B}\n"
    config = load(write(tmp_path, text))
    monkeypatch.setenv("SBX_TEST_A", "")
    monkeypatch.delenv("SBX_TEST_B", raising=False)
    assert missing_environment(config) == ["SBX_TEST_A", "SBX_TEST_B"]
    monkeypatch.setenv("SBX_TEST_A", "key")
    assert missing_environment(config) == ["SBX_TEST_B"]


def test_the_schema_describes_every_key() -> None:
    schema = Config.model_json_schema()
    bare = [
        f"{name}.{key}"
        for name, part in {"Config": schema, **schema["$defs"]}.items()
        for key, value in part.get("properties", {}).items()
        if "description" not in value and key != "engine"
    ]
    assert not bare
    assert schema["additionalProperties"] is False


ADAPTERS = """\
experts:
  local: {engine: transformers, model: ./model, max_adapters: 4}
  none: {engine: transformers, model: ./model}
  remote: {engine: openai, base_url: "http://127.0.0.1:9/v1", model: x}
adapter_files: {roots: [./there], watch: ./watched}
adapters:
"""


def test_adapters_are_declared_with_paths_from_the_file_on(tmp_path: Path) -> None:
    for folder in ("model", "there/banking"):
        (tmp_path / folder).mkdir(parents=True)
    config = load(write(tmp_path, ADAPTERS + "  banking: {base: local, path: there/banking, pinned: true}\n"))
    banking = config.adapters["banking"]
    assert (banking.path, banking.pinned, banking.replicas) == (tmp_path / "there/banking", True, None)
    limits = adapter_limits(config, "local")
    assert set(limits.roots) == {tmp_path / "there", tmp_path / "watched", tmp_path / "there/banking"}
    assert limits.max_rank == 16 and limits.max_bytes == 8 << 30


def test_without_roots_the_files_own_folder_is_the_root(tmp_path: Path) -> None:
    assert load(write(tmp_path, MINIMAL)).adapter_files.roots == (tmp_path,)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  a: {base: locl, path: there}", "signalbox.yaml:7: adapters.a.base: there is no expert 'locl'; did you mean 'local'?"),
        ("  a: {base: none, path: there}", "signalbox.yaml:7: adapters.a.base: expert 'none' takes no adapters: set its max_adapters"),
        ("  a: {base: remote, path: there}", "signalbox.yaml:7: adapters.a.base: expert 'remote' takes no adapters: its engine is openai"),
        ("  none: {base: local, path: there}", "signalbox.yaml:7: adapters.none: an expert has this name: call the adapter something else"),
        ("  a: {base: local, path: gone}", "signalbox.yaml:7: adapters.a.path: there is no such folder (gone)"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be(tmp_path: Path, line: str, said: str) -> None:
    for folder in ("model", "there"):
        (tmp_path / folder).mkdir()
    assert complaints(write(tmp_path, ADAPTERS + line)) == [said]


ESFT = "experts:\n  moe: {engine: %s, model: ./model, %s}\n"


def test_esft_is_served_by_vllm_in_rows_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = load(write(tmp_path, ESFT % ("vllm", "max_adapters: 9, adapter_kinds: [esft]")))
    moe = config.experts["moe"]
    assert isinstance(moe, VllmExpert) and moe.esft == EsftServing()
    limits = adapter_limits(config, "moe")
    assert limits.kinds == ("esft",) and limits.max_bytes == 8 << 30
    both = "max_adapters: 9, adapter_kinds: [esft, lora], esft: {rows: difference4, memory_gib: 2.5}"
    config = load(write(tmp_path, ESFT % ("vllm", both)))
    moe = config.experts["moe"]
    assert isinstance(moe, VllmExpert) and moe.esft == EsftServing(rows="difference4", memory_gib=2.5)
    assert adapter_limits(config, "moe").kinds == ("esft", "lora")
    config = load(write(tmp_path, ESFT % ("vllm", "max_adapters: 9")))
    assert adapter_limits(config, "moe").kinds == ("lora",)


@pytest.mark.parametrize(
    ("engine", "settings", "said"),
    [
        ("vllm", "adapter_kinds: [esft], max_adapters: 32, esft: {experts_per_layer: 1000}", ": max_adapters 32 times esft.experts_per_layer 1000 are 32000 rows in a layer; the kernels count to 16384: lower one of them"),
        ("vllm", "adapter_kinds: [esft]", ": adapter_kinds names esft and max_adapters is 0: set how many adapters are loaded at once"),
        ("vllm", "max_adapters: 9, esft: {}", ": esft is given and adapter_kinds does not name it: set adapter_kinds: [esft, lora]"),
        ("vllm", "max_adapters: 9, adapter_kinds: [esft, esft]", ".adapter_kinds: names a kind twice"),
        ("vllm", "max_adapters: 9, adapter_kinds: []", ".adapter_kinds: must have at least 1 entries, not 0"),
        ("vllm", "max_adapters: 9, adapter_kinds: esft", ".adapter_kinds: must be a list: [one, two]"),
        ("vllm", "max_adapters: 9, adapter_kinds: [esft], esft: {row: full}", ".esft.row: unknown key; did you mean 'rows'?"),
        ("vllm", "max_adapters: 9, adapter_kinds: [esft], esft: {rows: int4}", ".esft.rows: must be 'full' or 'difference4', not 'int4'"),
        ("vllm", "max_adapters: 9, adapter_kinds: 3", ".adapter_kinds: must be a list: [one, two]"),
        ("vllm", "max_adapters: 9, adapter_kinds: [esft], esft: {memory_gib: .inf}", ".esft.memory_gib: must be a finite number"),
        ("vllm", "max_adapters: 9, adapter_kinds: [esft], engine_args: {additional_config: {a: 1}}", ".engine_args.additional_config: is set for ESFT adapters (`esft`), which are not served with another value"),
        ("transformers", "max_adapters: 9, adapter_kinds: [lora, esft]", ".adapter_kinds: ESFT adapters need `engine: vllm`; this engine takes lora alone"),
        ("transformers", "max_adapters: 9, esft: {}", ": esft is for `engine: vllm`: this engine takes LoRA adapters alone"),
    ],
)  # fmt: skip
def test_esft_that_cannot_be_served(tmp_path: Path, engine: str, settings: str, said: str) -> None:
    (tmp_path / "model").mkdir()
    (message,) = complaints(write(tmp_path, ESFT % (engine, settings)))
    assert message == f"signalbox.yaml:2: experts.moe{said}"


ACCESS = """\
experts:
  remote: {engine: openai, base_url: "http://127.0.0.1:9/v1", model: x}
policies:
  gold: {priority: 5}
tenants:
  acme: {policy: gold, weight: 2}
keys:
  ci: {env: SBX_CI, tenant: acme, policy: gold}
"""


def test_keys_and_tenants(tmp_path: Path) -> None:
    config = load(write(tmp_path, ACCESS + "server: {host: 0.0.0.0}\ndefault_policy: gold\n"))
    assert config.keys["ci"].tenant == "acme" and config.tenants["acme"].weight == 2
    assert config.keys["ci"].policies == ("*",) and not config.keys["ci"].admin
    assert load(write(tmp_path, MINIMAL + "server: {host: 0.0.0.0, api_key_env: X}\n")).server.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("  b: {env: SBX_B, tenant: acne}", "9: keys.b.tenant: there is no tenant 'acne'; did you mean 'acme'?"),
        ("  b: {env: SBX_B, policy: glod}", "9: keys.b.policy: there is no policy 'glod'; did you mean 'gold'?"),
        ("  b: {env: SBX_CI}", "9: keys.b.env: keys.ci.env names SBX_CI as well: each key needs a variable of its own"),
        ("server: {api_key_env: SBX_CI}", "8: keys.ci.env: server.api_key_env names SBX_CI as well: each key needs a variable of its own"),
        ("  b: {}", "9: keys.b.env: must be given: environment variable that holds the key"),
        ("  b: {env: SBX_B, key: secret}", "9: keys.b.key: unknown key; known: env, tenant, policy, policies, admin"),
        ("default_policy: glod", "9: default_policy: there is no policy 'glod'; did you mean 'gold'?"),
    ],
)  # fmt: skip
def test_access_that_cannot_be(tmp_path: Path, line: str, said: str) -> None:
    assert complaints(write(tmp_path, ACCESS + line)) == [f"signalbox.yaml:{said}"]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("{parallel: {samples: 3, arbiter: judge, judge: remot}}", "policies.gold.parallel.judge: there is no expert 'remot'; did you mean 'remote'?"),
        ("{intents: {sums: {parallel: {arbiter: judge, judge: none}}}}", "policies.gold.intents.sums.parallel.judge: there is no expert 'none'; known: remote"),
        ("{parallel: {arbiter: judge}}", "policies.gold.parallel: `arbiter: judge` needs `judge: EXPERT`, and nothing else does"),
    ],
)  # fmt: skip
def test_a_judge_is_an_expert(tmp_path: Path, policy: str, said: str) -> None:
    assert complaints(write(tmp_path, MINIMAL + f"policies: {{gold: {policy}}}\n")) == [f"signalbox.yaml:3: {said}"]
    load(write(tmp_path, MINIMAL + "policies: {gold: {parallel: {arbiter: judge, judge: remote}}}\n"))


def test_a_tenants_policy_is_declared(tmp_path: Path) -> None:
    text = ACCESS.replace("acme: {policy: gold", "acme: {policy: golden")
    assert complaints(write(tmp_path, text)) == [
        "signalbox.yaml:6: tenants.acme.policy: there is no policy 'golden'; did you mean 'gold'?"
    ]
