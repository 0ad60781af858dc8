"""What a problem is, and reading a set of them of which every one must be good.

A problem's code is parsed here and never executed: whether it really runs is the judge's business (`verification`).
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.problems.entries import Entry, entries_of, layout_of, require_place


@dataclass(frozen=True)
class Problem:
    """A PyTorch module that a kernel is to be written for.

    Attributes:
        key: unique within what was read together: the file's stem, behind its level folder where it is in one
            ("level3/23_Name"), or the record's `key` or `sample_key`.
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
    """Load every problem under `path`, or none: the first that cannot be a problem is an error.

    Args:
        path: a folder of `*.py` files (taken in the order of their names; a leading underscore or dot hides a file),
            one `.py` file, or a `.jsonl` file with `pytorch_code` and `key` (or `sample_key`) on each line. Also what
            else of local files `read_problems` takes, which goes on after a bad problem.

    Raises:
        PipelineError: nothing there, a file that cannot be read, or a problem without a module or without
            `get_inputs()`.
    """
    problems = []
    for entry, fault in judged(local_entries(Path(path))):
        if fault is not None:
            raise PipelineError(said(entry, fault))
        problems.append(problem_of(entry))
    return problems


def local_entries(path: Path, *, source: str = "") -> list[Entry]:
    """What lies in a file or a folder of problems.

    Raises:
        PipelineError: nothing is there, or nothing in it.
    """
    require_place(path)
    files = layout_of(path).files if path.is_dir() else [(path, "")]
    if not files:
        raise PipelineError(
            f"{path} holds no problems: put KernelBench-format *.py files there, "
            "or in folders called level1, level2 and so on."
        )
    entries = [entry for file, prefix in files for entry in entries_of(file, prefix=prefix, source=source)]
    if not entries:
        raise PipelineError(f"{path} holds no problems: write one JSON object a line, with key and pytorch_code.")
    return entries


def judged(entries: list[Entry]) -> Iterator[tuple[Entry, str | None]]:
    """Each entry and what is wrong with it, as half a sentence, or None. The second of two equal keys is wrong."""
    first: dict[str, Entry] = {}
    for entry in entries:
        fault = entry.fault or fault_of(entry.code or "")
        # A bad problem does not keep its key from a good one.
        other = first.setdefault(entry.key, entry) if fault is None else entry
        if other is not entry:
            where = f"on {other.spot}" if other.file == entry.file and other.spot else f"in {other.place}"
            fault = f"the key is {where} already; keys must be unique"
        yield entry, fault


def problem_of(entry: Entry) -> Problem:
    """The problem of a good entry."""
    return Problem(entry.key, entry.code or "", entry.source, entry.level, entry.name)


def said(entry: Entry, fault: str) -> str:
    """A fault as a sentence that names its place."""
    key = f" ({entry.key})" if entry.spot and entry.named else ""
    join = " " if fault.startswith("cannot be read") else ": "
    return f"{entry.place}{key}{join}{fault}."


def fault_of(code: str) -> str | None:
    """Why code cannot be a problem, judged by its syntax tree alone, as half a sentence; None for what can."""
    if not code.strip():
        return "it is empty; a problem defines an nn.Module and get_inputs()"
    try:
        tree = parse_module(code)
    # ValueError: a null byte; the last two: an expression nested too deep.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"the PyTorch code is not valid Python ({str(error) or type(error).__name__})"
    if not module_classes(tree):
        return "no class derives from nn.Module; a problem defines the module that the kernel replaces"
    if "get_inputs" not in _top_level_names(tree):
        return "no get_inputs(); a problem defines the inputs that the module is called with"
    return None


def require_problem(code: str, named: str = "the PyTorch code") -> None:
    """Refuse code that no kernel could be judged against, before anybody is asked for one.

    Args:
        named: how a person knows the code, such as its file.

    Raises:
        PipelineError: it is no problem; with what is missing.
    """
    if fault := fault_of(code):
        raise PipelineError(
            f"{named}: {fault}. Several answers are judged against it: complete it, or ask for one, which is not."
        )


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
