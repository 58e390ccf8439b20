"""Imports run one way: each folder only imports from those below it (docs/architecture.md, section 3)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["kernels", "adapters", "experts", "router", "policies", "serving"]
# The router predicts for experts it knows by name alone; it never touches an engine.
ROUTER_MAY_IMPORT = {"signalbox.experts.catalog", "signalbox.experts.base", "signalbox.experts.models"}


def imported_modules(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: relative import; name the package"
            found.add(node.module or "")
    return found


def violations(floor: str, modules: set[str]) -> list[str]:
    """The modules that code on this floor must not import."""
    bad = []
    for module in sorted(modules):
        parts = module.split(".")
        if parts[0] in FLOORS:
            bad.append(f"{module} (bare name)")
        if parts[0] != "signalbox" or len(parts) < 2 or parts[1] not in FLOORS:
            continue
        if FLOORS.index(parts[1]) > FLOORS.index(floor):
            bad.append(module)
        if floor == "router" and parts[1] == "experts" and ".".join(parts[:3]) not in ROUTER_MAY_IMPORT:
            bad.append(module)
        if floor == "router" and parts[1] in ("kernels", "adapters"):
            bad.append(module)
    return bad


@pytest.mark.parametrize("floor", FLOORS)
def test_each_floor_imports_only_downwards(floor: str) -> None:
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files, f"no files in {floor}/"
    for file in files:
        assert not violations(floor, imported_modules(file)), file


def test_the_rule_would_notice() -> None:
    assert violations("experts", {"signalbox.router.base"})
    assert violations("kernels", {"signalbox.adapters"})
    assert violations("router", {"signalbox.experts.transformers_engine"})
    assert violations("serving", {"kernels.reroute"})
    assert not violations("serving", {"signalbox.kernels.reroute", "torch"})


def test_kernels_package_stays_trivial() -> None:
    """Hugging Face's `kernels` may be looked up under the same name: importing ours must cost nothing."""
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)
