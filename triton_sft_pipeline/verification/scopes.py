"""What names stand for in a kernel's source, and which of its code never runs. Judges nothing.

A scope knows the names that it binds, and for each the dotted paths that were imported under it and the expressions it
renames (`F = torch.nn.functional`). A name that is bound in several ways stands for all of them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from triton_sft_pipeline.verification import forbidden

WRAPPER = "triton_kernel_wrapper"
MODEL_CLASS = "ModelNew"

Function = ast.FunctionDef | ast.AsyncFunctionDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
Scoped = Function | ast.ClassDef | ast.Lambda | Comprehension


@dataclass
class Scope:
    """The names that a module, class, function or comprehension binds.

    Attributes:
        outer: names that it binds elsewhere, by global or nonlocal; they are not among `origins`.
        local: whether a name that is bound here can never fall through to a builtin, as in functions.
        is_class: functions inside do not see its names.
        origins: by name, the dotted paths it was imported as and the expressions it renames; neither: its own.
    """

    local: bool
    is_class: bool = False
    origins: dict[str, list[str | ast.expr]] = field(default_factory=dict)
    outer: set[str] = field(default_factory=set)


def scope_of(node: ast.Module | Scoped) -> Scope:
    """The names that a module, class, function or comprehension binds, without those of scopes inside of it."""
    scope = Scope(local=not isinstance(node, ast.Module | ast.ClassDef), is_class=isinstance(node, ast.ClassDef))
    if isinstance(node, Function | ast.Lambda):
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                scope.origins[argument.arg] = []
    inside: list[ast.AST] = []
    if isinstance(node, Comprehension):
        inside = [generator.target for generator in node.generators]
    elif not isinstance(node, ast.Lambda):
        inside = list(node.body)
    for child in own_nodes(inside):
        if isinstance(child, ast.Global | ast.Nonlocal):
            scope.outer |= set(child.names)
        for name, origin in _bindings(child):
            scope.origins.setdefault(name, []).extend(origin)
    scope.origins = {name: origin for name, origin in scope.origins.items() if name not in scope.outer}
    return scope


def own_nodes(nodes: list[ast.AST]) -> Iterator[ast.AST]:
    """These nodes and what is below them, without the insides of other scopes."""
    for node in nodes:
        yield node
        if not isinstance(node, Scoped):
            yield from own_nodes(list(ast.iter_child_nodes(node)))


def _bindings(node: ast.AST) -> Iterator[tuple[str, list[str | ast.expr]]]:
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id, []
    elif isinstance(node, ast.Import):
        for alias in node.names:
            yield (
                alias.asname or alias.name.partition(".")[0],
                [alias.name if alias.asname else alias.name.partition(".")[0]],
            )
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name, [f"{node.module}.{alias.name}"]
    elif (renamed := renaming_of(node)) is not None:
        yield renamed
    elif isinstance(node, Function | ast.ClassDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name, []
    elif isinstance(node, ast.MatchMapping) and node.rest:
        yield node.rest, []


def renaming_of(node: ast.AST) -> tuple[str, list[str | ast.expr]] | None:
    """The name and the expression of `name = a.b.c`."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target: ast.expr = node.targets[0]
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        target = node.target
    else:
        return None
    if isinstance(target, ast.Name) and isinstance(node.value, ast.Name | ast.Attribute):
        return target.id, [node.value]
    return None


def harmless_places(node: ast.AST) -> Iterator[ast.AST]:
    """Below this node, where the names of modules and classes are looked at or called, but not handed on."""
    places: list[ast.AST | None] = []
    if isinstance(node, ast.Call):
        yield node.func
        if is_named(node.func, ("isinstance", "issubclass")):
            places = [*node.args[1:]]
        elif is_named(node.func, ("getattr", "hasattr", "setattr", "delattr")):
            yield from node.args[:1]
    elif isinstance(node, ast.Compare):
        places = [node.left, *node.comparators]
    elif isinstance(node, ast.Subscript):
        yield node.value
    elif isinstance(node, ast.ClassDef):
        places = [*node.bases]
    elif isinstance(node, Function):
        places = [node.returns]
    elif isinstance(node, ast.arg | ast.AnnAssign):
        places = [node.annotation]
    if isinstance(node, ast.stmt) and (renamed := renaming_of(node)) is not None:
        yield from (item for item in renamed[1] if isinstance(item, ast.expr))
    for place in places:
        yield from parts_of_type(place)


def parts_of_type(node: ast.AST | None) -> Iterator[ast.AST]:
    """The names in what may be a type or several, such as Optional[torch.Tensor] and (int, torch.Tensor)."""
    if node is not None:
        yield node
        if isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Subscript | ast.BinOp):
            for child in ast.iter_child_nodes(node):
                yield from parts_of_type(child)


def is_named(node: ast.AST, names: tuple[str, ...]) -> bool:
    """Whether this is a plain name, and one of these."""
    return isinstance(node, ast.Name) and node.id in names


def is_main_block(node: ast.AST) -> bool:
    """Whether this is `if __name__ == "__main__":`. Nothing may bind `__name__` in code that is loaded."""
    if not isinstance(node, ast.If) or not isinstance(node.test, ast.Compare) or len(node.test.ops) != 1:
        return False
    sides = [ast.unparse(side) for side in (node.test.left, node.test.comparators[0])]
    return isinstance(node.test.ops[0], ast.Eq) and sorted(sides) == ["'__main__'", "__name__"]


def dormant_functions(tree: ast.Module) -> set[int]:
    """The ids of top-level functions that no running code mentions by any name, attribute or text.

    Sound because the ways to a function that do without its name (globals, modules as values) are refused.
    """
    plain: dict[str, list[ast.AST]] = {}
    running: list[ast.AST] = []
    for node in tree.body:
        if isinstance(node, Function) and not node.decorator_list and not forbidden.is_dunder(node.name):
            plain.setdefault(node.name, []).append(node)
            running += [node.args, *([node.returns] if node.returns else [])]
        elif is_main_block(node):
            running += node.orelse if isinstance(node, ast.If) else []
        else:
            running.append(node)
    mentioned = {WRAPPER, MODEL_CLASS}.union(*map(_mentions, running))
    while reached := [name for name in plain if name in mentioned]:
        mentioned = mentioned.union(*(_mentions(node) for name in reached for node in plain.pop(name)))
    return {id(node) for nodes in plain.values() for node in nodes}


def _mentions(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names
