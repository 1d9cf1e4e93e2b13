"""Imports point one way (CONTRIBUTING.md): read from the source, so that lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("flexidit", "lightning_modules", "datamodules", "callbacks")

# layers of flexidit, lowest first: a module may import its own layer and those below
LAYERS = [
    ("patch_size",),
    ("config", "token_layout", "conditions"),
    ("patch_embed", "positions"),
    ("layers",),
    ("text_layers",),
    ("wan_layers",),
    ("models",),
    ("variants", "layouts", "recipes", "lora", "checkpoint"),
]
MODEL_FREE = ("diffusion", "sampling")  # take the model as a callable


def sources(repository: Path) -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((repository / package).rglob("*.py")):
            yield ".".join(path.relative_to(repository).with_suffix("").parts).removesuffix(".__init__"), path


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.fixture(scope="module")
def graph(repository: Path) -> dict[str, set[str]]:
    return {name: imported(path) for name, path in sources(repository)}


def starts(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def part(name: str) -> str:
    return name.split(".")[1] if name.startswith("flexidit.") else ""


def test_every_package_is_read(graph: dict[str, set[str]]) -> None:
    assert {name.split(".")[0] for name in graph} == set(PACKAGES)


def test_lower_layers_do_not_import_higher_ones(graph: dict[str, set[str]]) -> None:
    rank = {module: level for level, modules in enumerate(LAYERS) for module in modules}
    wrong = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if part(name) in rank and target.startswith("flexidit.") and part(target) in [*rank, *MODEL_FREE, "commands"]
        if rank.get(part(target), len(LAYERS)) > rank[part(name)]
    ]
    assert wrong == []


def test_diffusion_and_sampling_do_not_know_the_models(graph: dict[str, set[str]]) -> None:
    forbidden = ("models", "layers", "recipes", "variants", "checkpoint", "lora", "flops")
    wrong = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if part(name) in MODEL_FREE and part(target) in forbidden
    ]
    assert wrong == []


def test_only_commands_of_flexidit_import_lightning_or_the_packages_above(graph: dict[str, set[str]]) -> None:
    above = ("lightning", "lightning_modules", "datamodules", "callbacks")
    wrong = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        if name.startswith("flexidit") and part(name) not in ("cli", "commands")
        if any(starts(target, package) for package in above)
    ]
    assert wrong == []


def test_modules_data_and_callbacks_do_not_import_one_another(graph: dict[str, set[str]]) -> None:
    wrong = [
        f"{name} -> {target}"
        for name, targets in graph.items()
        for target in targets
        for package in PACKAGES[1:]
        if not name.startswith("flexidit") and starts(target, package) and not starts(name, package)
    ]
    assert wrong == []


def test_only_lora_imports_peft(graph: dict[str, set[str]]) -> None:
    assert [name for name, targets in graph.items() if any(starts(t, "peft") for t in targets)] == ["flexidit.lora"]
