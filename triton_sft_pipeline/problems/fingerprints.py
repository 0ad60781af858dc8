"""Tells whether two problems are the same: a hash of what a module computes, blind to how it is written down.

Used to keep all traces of one problem on one side of a split, and held-out problems out of the training data. It does
not see through renamed variables (but for a module's only input) or reordered statements: two problems with one
fingerprint are the same, two with different ones may still be alike.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from triton_sft_pipeline.files import hash_json, sha256_bytes
from triton_sft_pipeline.problems.loading import Problem, parse_module

# What the module is called with, and nothing of what it computes.
_INPUT_FUNCTIONS = frozenset({"get_inputs", "get_init_inputs"})
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def fingerprint(pytorch_code: str) -> str:
    """Hex SHA-256 of the module's normalised syntax tree.

    These do not matter: comments, docstrings, formatting, annotations, the names of classes, how a library is imported
    (`nn.ReLU` and `torch.nn.ReLU`), a module's `__init__` that only calls its base's, what `forward` calls its input
    when that is the only one, `get_inputs` and `get_init_inputs`, and top-level names that only those used (such as
    `batch_size`). Text that does not parse is hashed with its white space collapsed.
    """
    try:
        tree = parse_module(pytorch_code)
        normal_form = _outline(_Normaliser(tree).visit(_without_inputs(tree)))
    # The parser raises MemoryError, and what walks its tree RecursionError, for expressions that are nested too deep.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        normal_form = re.sub(r"\s+", " ", pytorch_code).strip()
    return sha256_bytes(normal_form.encode("utf-8", "surrogatepass"))


def hash_problems(problems: Iterable[Problem]) -> str:
    """Hex SHA-256 of a set of problems: every key and its exact code, inputs included. The order does not matter."""
    return hash_json(sorted([problem.key, problem.pytorch_code] for problem in problems))


def _without_inputs(tree: ast.Module) -> ast.Module:
    """Drop the input functions, the script part and then everything that nothing refers to any more; classes stay."""
    body = [node for node in tree.body if not _is_dropped(node)]
    while True:
        used = {
            name.id
            for node in body
            for name in ast.walk(node)
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Load)
        }
        kept = [node for node in body if _bound_names(node) is None or _bound_names(node) & used]  # type: ignore[operator]
        if len(kept) == len(body):
            return ast.Module(body=body, type_ignores=[])
        body = kept


def _is_dropped(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name in _INPUT_FUNCTIONS
    if isinstance(node, ast.If):
        return "__name__" in ast.unparse(node.test)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _bound_names(node: ast.stmt) -> set[str] | None:
    """The names that a statement exists to define, or None when it must stay whoever refers to it."""
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return None


class _Normaliser(ast.NodeTransformer):
    """Rewrites a tree so that spelling which does not change the computation is gone."""

    def __init__(self, tree: ast.Module) -> None:
        classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        self._names = {name: f"class_{index}" for index, name in enumerate(dict.fromkeys(classes))}
        self._imported: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._import({alias.asname or alias.name.split(".")[0]: _import_target(alias) for alias in node.names})
            elif isinstance(node, ast.ImportFrom):
                origin = "." * node.level + (node.module or "")
                self._import({alias.asname or alias.name: f"{origin}.{alias.name}" for alias in node.names})

    def _import(self, paths: dict[str, str]) -> None:
        self._names.update(paths)
        self._imported.update(paths.values())

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(id=self._names.get(node.id, node.id), ctx=node.ctx)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        value = self.visit(node.value)
        if isinstance(value, ast.Name) and value.id in self._imported:
            path = f"{value.id}.{node.attr}"
            self._imported.add(path)
            return ast.Name(id=path, ctx=node.ctx)
        return ast.Attribute(value=value, attr=node.attr, ctx=node.ctx)

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "super":
            node.args = []
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.name = self._names[node.name]
        self._visit_block(node)
        if [_outline(base) for base in node.bases] == [_MODULE]:
            # Most modules without parameters say what happens anyway; some leave it out.
            node.body = [part for part in node.body if _outline(part) != _PLAIN_INIT] or [ast.Pass()]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        if node.name == "forward" and "x" not in self._names:
            _call_the_only_input_x(node)
        return self._visit_block(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(arg=node.arg)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return self.visit(ast.Assign(targets=[node.target], value=node.value))

    def _visit_block(self, node: ast.ClassDef | ast.FunctionDef) -> ast.AST:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)


def _call_the_only_input_x(forward: ast.FunctionDef) -> None:
    """As most modules do. Nothing happens when there are more inputs, or when something else is called so."""
    given = forward.args
    if len(given.args) != 2 or given.posonlyargs or given.vararg or given.kwonlyargs or given.kwarg or given.defaults:
        return
    inside = list(ast.walk(forward))
    names = [node for node in inside if isinstance(node, ast.Name)]
    arguments = [node for node in inside if isinstance(node, ast.arg)]
    if "x" in {node.id for node in names} | {node.arg for node in arguments}:
        return
    old = given.args[1].arg
    for name in names:
        name.id = "x" if name.id == old else name.id
    for argument in arguments:
        argument.arg = "x" if argument.arg == old else argument.arg


def _import_target(alias: ast.alias) -> str:
    return alias.name if alias.asname else alias.name.split(".")[0]


def _outline(node: object) -> str:
    """The tree as text, the same in every Python version: newer ones add fields, but empty fields are left out."""
    if isinstance(node, ast.AST):
        fields = (
            (name, getattr(node, name, None)) for name in node._fields if name not in ("ctx", "kind", "type_comment")
        )
        written = [f"{name}={_outline(value)}" for name, value in fields if value not in (None, [])]
        return f"{type(node).__name__}({', '.join(written)})"
    if isinstance(node, list):
        return f"[{', '.join(_outline(item) for item in node)}]"
    return repr(node)


_PLAIN_INIT = _outline(ast.parse("def __init__(self):\n    super().__init__()").body[0])
_MODULE = _outline(ast.Name("torch.nn.Module", ast.Load()))
