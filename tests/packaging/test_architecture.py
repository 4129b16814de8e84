"""The arrows of the architecture: cli -> {pipelines, serve} -> model, and what no package may import."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("model", "pipelines", "serve", "cli")
FORBIDDEN = {
    "model": {
        "ray",
        "fastapi",
        "starlette",
        "uvicorn",
        "httpx",
        "requests",
        "datasets",
        "pandas",
        "typer",
        "rich",
    },
    "pipelines": {"fastapi", "starlette", "uvicorn", "typer"},
    "serve": {"typer"},
    "cli": set[str](),
}
ARROWS = {
    "model": {"model"},
    "pipelines": {"pipelines", "model"},
    "serve": {"serve", "model"},
    "cli": {"cli", "pipelines", "serve", "model"},
}


LAYERS = {"pipelines": ("terms", "inputs", "outputs", "planning", "making", "report", "upkeep")}
"""Folders whose modules import those of the same and of earlier ones only, by whatever way."""


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (
                [node.module] if node.module != "diffray" else [f"diffray.{a.name}" for a in node.names]
            )


def module(path: Path) -> str:
    """The dotted name of a file, from its package on."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def neighbours(path: Path) -> Iterator[str]:
    """The modules of the same package that a file imports, anywhere in it."""
    inside = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*inside[: len(inside) - node.level + 1], *(node.module or "").split(".")]
            name = ".".join(filter(None, base))
            found = [f"{name}.{alias.name}" for alias in node.names]
            yield from (one for one in found if (ROOT / one.replace(".", "/")).with_suffix(".py").exists())
            yield name


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package: str) -> None:
    for path in sources(package):
        for name in imports(path):
            top, _, rest = name.partition(".")
            assert top not in FORBIDDEN[package], f"{path}: imports {name}"
            assert top != "diffusers", f"{path}: diffusers is an oracle for tests, never a dependency"
            assert top not in {"training", "benchmarks", "tests", *PACKAGES}, f"{path}: imports {name}"
            if top == "diffray":
                assert rest.split(".")[0] in ARROWS[package], f"{path}: {package} must not import {name}"


@pytest.mark.parametrize("package", LAYERS)
def test_folders_import_earlier_ones_only(package: str) -> None:
    layers = LAYERS[package]
    assert set(layers) == {p.parent.name for p in (ROOT / package).glob("*/__init__.py")}
    needs = {module(path): set(neighbours(path)) for path in sources(package)}

    def level(name: str) -> int:
        """Of its folder; 0 beside the folders."""
        folder = f"{name}.".split(".")[1]
        return layers.index(folder) + 1 if folder in layers else 0

    for start in filter(level, needs):
        reached, left = {start}, [start]
        while left:
            new = needs.get(left.pop(), set()) - reached
            reached |= new
            left += new
        assert not (above := [name for name in reached if level(name) > level(start)]), f"{start}: {above}"


@pytest.mark.parametrize("folder", ["tests", "training", "benchmarks", "examples"])
def test_nothing_imports_a_second_copy(folder: str) -> None:
    """From the repository root `import model` works too, and makes a second copy of every class."""
    for path in sources(folder):
        for name in imports(path):
            assert name.partition(".")[0] not in PACKAGES, f"{path}: import diffray.{name} instead"


def test_every_package_folder_is_listed_for_the_wheel() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent.relative_to(ROOT) for top in PACKAGES for p in (ROOT / top).rglob("__init__.py")}
    assert {"diffray." + ".".join(folder.parts) for folder in folders} == set(config["packages"])
    assert {key.removeprefix("diffray.") for key in config["package-dir"]} == set(PACKAGES)


def test_every_dependency_is_pinned_and_explained() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.split(r"[\[>=<]", requirement)[0].lower().replace("_", "-")
        assert name in pinned, f"constraints.txt does not pin {name}"
    for requirement in project["dependencies"]:
        line = next(line for line in text.splitlines() if f'"{requirement}"' in line)
        assert "#" in line, f"{requirement}: say why it is a dependency"
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_nothing_is_unpickled_outside_the_restricted_loader() -> None:
    for package in PACKAGES:
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                name = ast.unparse(node.func)
                # Ray's own messages between our processes are pickles; what users hand us never is.
                trusted = path.relative_to(ROOT) == Path("pipelines/making/pools.py")
                assert trusted or name not in {"pickle.load", "pickle.loads"}, f"{path}:{node.lineno}: {name}"
                if name == "torch.load":
                    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert given.get("weights_only") == "True", (
                        f"{path}:{node.lineno}: torch.load without weights_only"
                    )
