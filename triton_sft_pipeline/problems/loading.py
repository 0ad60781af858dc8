"""Reads problems from KernelBench-format files or a JSON Lines file.

A problem's code is parsed here and never executed: whether it really runs is the judge's business (`verification`).
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_sft_pipeline.errors import PipelineError

# KernelBench calls its files "23_Softmax.py" and keeps them in folders called "level1" to "level4".
_FILE_NAME = re.compile(r"(?:\d+_)?(?P<name>.+)")
_LEVEL_FOLDER = re.compile(r"level_?(?P<level>\d+)")


@dataclass(frozen=True)
class Problem:
    """A PyTorch module that a kernel is to be written for.

    Attributes:
        key: unique within one file or folder; the file's stem, or the record's `key` or `sample_key`.
        pytorch_code: source text that defines an nn.Module, `get_inputs()` and, when the module takes arguments,
            `get_init_inputs()`.
        source: where the problem comes from, such as "kernelbench"; empty when unknown.
        level: KernelBench's level, 1 to 4.
        name: a readable name.
    """

    key: str
    pytorch_code: str
    source: str = ""
    level: int | None = None
    name: str | None = None


def load_problems(path: Path) -> list[Problem]:
    """Load every problem under `path`.

    Args:
        path: a folder of `*.py` files (taken in the order of their names; a leading underscore or dot hides a file),
            one `.py` file, or a `.jsonl` file with `pytorch_code` and `key` (or `sample_key`) on each line.

    Raises:
        PipelineError: nothing there, a file that cannot be read, or a problem without a module or without
            `get_inputs()`.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.glob("*.py") if not file.name.startswith(("_", ".")))
        if not files:
            raise PipelineError(f"{path} holds no problems: put KernelBench-format *.py files there.")
        return [_problem_from_file(file) for file in files]
    if not path.is_file():
        raise PipelineError(
            f"There are no problems at {path}: name a folder of *.py files, a .py file or a .jsonl file."
        )
    if path.suffix == ".py":
        return [_problem_from_file(path)]
    if path.suffix == ".jsonl":
        return _problems_from_jsonl(path)
    raise PipelineError(f"{path} is neither a folder of *.py files, nor a .py file, nor a .jsonl file.")


def _problem_from_file(file: Path) -> Problem:
    code = _read_text(file)
    _check_runnable(code, str(file))
    level = _LEVEL_FOLDER.fullmatch(file.resolve().parent.name)
    name = _FILE_NAME.fullmatch(file.stem)
    return Problem(
        key=file.stem,
        pytorch_code=code,
        level=int(level["level"]) if level else None,
        name=name["name"] if name else None,
    )


def _problems_from_jsonl(file: Path) -> list[Problem]:
    problems: list[Problem] = []
    line_of_key: dict[str, int] = {}
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        problem = _problem_from_record(_read_record(line, place), place)
        if problem.key in line_of_key:
            raise PipelineError(
                f"{place}: the key {problem.key!r} is on line {line_of_key[problem.key]} already; keys must be unique."
            )
        line_of_key[problem.key] = number
        problems.append(problem)
    if not problems:
        raise PipelineError(f"{file} holds no problems: write one JSON object a line, with key and pytorch_code.")
    return problems


def _read_record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PipelineError(f"{place}: not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise PipelineError(f"{place}: expected a JSON object, found {type(record).__name__}.")
    return record


def _problem_from_record(record: dict[str, Any], place: str) -> Problem:
    key = record.get("key", record.get("sample_key"))
    if not isinstance(key, str) or not key:
        raise PipelineError(f"{place}: no key; give each problem a string `key` (or `sample_key`).")
    code = record.get("pytorch_code")
    if not isinstance(code, str):
        raise PipelineError(f"{place} ({key}): `pytorch_code` must be a string, found {type(code).__name__}.")
    _check_runnable(code, f"{place} ({key})")
    level, name = record.get("level"), record.get("name")
    return Problem(
        key=key,
        pytorch_code=code,
        source=str(record.get("source") or ""),
        level=level if isinstance(level, int) else None,
        name=name if isinstance(name, str) else None,
    )


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"{file} cannot be read: {error}.") from error


def _check_runnable(code: str, place: str) -> None:
    """Refuse code that cannot be a problem, judged by its syntax tree alone."""
    try:
        tree = parse_module(code)
    # ValueError: a null byte; the last two: an expression nested too deep.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise PipelineError(f"{place}: the PyTorch code is not valid Python ({error}).") from error
    if not module_classes(tree):
        raise PipelineError(
            f"{place}: no class derives from nn.Module; a problem defines the module that the kernel replaces."
        )
    if "get_inputs" not in _top_level_names(tree):
        raise PipelineError(f"{place}: no get_inputs(); a problem defines the inputs that the module is called with.")


def parse_module(code: str) -> ast.Module:
    """The syntax tree of a problem. What Python thinks of its style (`"\\d"` in a plain string) is nobody's business.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: as `ast.parse`.
    """
    with warnings.catch_warnings():
        # Python 3.11 calls it a DeprecationWarning.
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return ast.parse(code)


def module_classes(tree: ast.Module) -> list[str]:
    """Names of the top-level classes that look like nn.Module subclasses, in the order of the file.

    A base class may come from anywhere (`nn.Linear`, `_Loss`), so a class with a base and a `forward` method counts
    too.
    """
    found: list[str] = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        bases = [ast.unparse(base) for base in node.bases]
        derives = any(base in found or base.split(".")[-1] == "Module" or ".nn." in f".{base}" for base in bases)
        has_forward = any(isinstance(item, ast.FunctionDef) and item.name == "forward" for item in node.body)
        if derives or (bases and has_forward):
            found.append(node.name)
    return found


def _top_level_names(tree: ast.Module) -> set[str]:
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
