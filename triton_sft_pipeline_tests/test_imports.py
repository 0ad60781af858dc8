"""Who may know whom, and that importing costs nothing: what the design says in prose, checked against the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Set
from functools import cache
from pathlib import Path

import pytest

import triton_sft_pipeline

PACKAGE = Path(triton_sft_pipeline.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "triton",
    "datasets",
    "pandas",
    "pyarrow",
    "accelerate",
    "matplotlib",
}
MADE_OF_TORCH = {"torch", "triton", "transformers", "peft", "bitsandbytes"}
"""What `training.experts` and `training.fast` may import at once: they are imported inside functions only."""
ROOMS = ("traces", "chat", "training", "verification", "problems", "evaluation")


def imports(node: ast.AST, inside_functions: bool) -> Iterator[str]:
    """Full names that a module imports, those under `if TYPE_CHECKING` left out. Names inside functions on demand."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute in this house"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, inside_functions)


@cache
def imported_by(path: Path, inside_functions: bool = True) -> frozenset[str]:
    return frozenset(imports(ast.parse(path.read_text(encoding="utf-8")), inside_functions))


def rooms_of(names: Set[str]) -> set[str]:
    """The rooms and modules of this project among imported names."""
    return {name.split(".")[1] for name in names if name.startswith("triton_sft_pipeline.")}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_the_walk_sees_what_is_there() -> None:
    assert {room(path) for path in MODULES} >= set(ROOMS)
    assert "triton_sft_pipeline.chat.make.make_dataset" in imported_by(PACKAGE / "api.py")
    assert "triton_sft_pipeline.chat.make.make_dataset" not in imported_by(PACKAGE / "api.py", inside_functions=False)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_nothing_heavy_is_imported_when_a_module_is(path: Path) -> None:
    allowed = MADE_OF_TORCH if path.parent.name in ("experts", "fast") and room(path) == "training" else set()
    imported = {name.split(".")[0] for name in imported_by(path, inside_functions=False)}
    assert (HEAVY - allowed).isdisjoint(imported)


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in ROOMS], ids=name)
def test_no_room_knows_dagster_or_who_calls_it(path: Path) -> None:
    found = imported_by(path)
    assert not any(imported.split(".")[0].startswith("dagster") for imported in found)
    assert rooms_of(found).isdisjoint(
        {"assets", "checks", "resources", "definitions", "refresh", "automation", "cli", "api"}
        | {"judgeable", "judging", "labels"}
    )


@pytest.mark.parametrize(
    ("which", "allowed"),
    [
        ("problems", {"problems", "errors", "files", "hub"}),
        ("verification", {"verification", "errors", "files"}),
        ("traces", {"traces", "problems", "errors", "files", "hub"}),
        ("chat", {"chat", "traces", "errors", "files"}),
    ],
)
def test_a_room_knows_those_that_the_design_lets_it_know(which: str, allowed: set[str]) -> None:
    for path in MODULES:
        if room(path) == which:
            assert rooms_of(imported_by(path)) <= allowed, name(path)


def test_the_shared_modules_know_nobody() -> None:
    assert rooms_of(imported_by(PACKAGE / "errors.py")) == set()
    assert rooms_of(imported_by(PACKAGE / "files.py")) == set()
    assert rooms_of(imported_by(PACKAGE / "hub.py")) == {"errors"}
    assert rooms_of(imported_by(PACKAGE / "progress.py")) == set()
    assert rooms_of(imported_by(PACKAGE / "processes.py")) == set()
    assert rooms_of(imported_by(PACKAGE / "storage.py")) == {"errors", "files", "processes"}


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_definitions_loads_nothing_heavy() -> None:
    loaded = loaded_after("import triton_sft_pipeline.definitions")
    assert "dagster" in loaded and HEAVY.isdisjoint(loaded)


def test_importing_the_package_and_the_command_line_loads_neither_dagster_nor_anything_heavy() -> None:
    loaded = loaded_after(
        "from triton_sft_pipeline import load_and_filter_traces, main, train\nimport triton_sft_pipeline.cli"
    )
    assert (HEAVY | {"dagster"}).isdisjoint(loaded)


def test_importing_the_package_alone_loads_none_of_its_modules() -> None:
    code = "import sys, triton_sft_pipeline\nprint(*[m for m in sys.modules if m.startswith('triton_sft_pipeline')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["triton_sft_pipeline"]
