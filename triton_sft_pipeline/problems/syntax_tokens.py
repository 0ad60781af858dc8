"""Writes a syntax tree as tokens under the names that it would have if it had chosen none.

A function's own names become `%0`, `%1` in the order in which they appear in it; the file's own functions, classes and
constants `@0`; attributes that it sets `.@0`; keywords that are parameters of its own `=@0`. A library's function is
one token, its full path. `x.abs()` is written as `torch.abs(x)`, `torch.add(x, y)` as `x + y`, `x += y` as `x = x + y`
and `F.relu` as `torch.relu`. Nothing else is lost: two files with equal tokens compute the same.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
# What is called from outside by name.
_PROTOCOL = frozenset({"__init__", "forward", "triton_kernel_wrapper", "ModelNew"})
# Fields that say how something is written down, and no more.
_UNSAID = frozenset({"annotation", "returns", "type_comment", "ctx", "kind", "type_params", "simple"})
_OPERATORS = {
    "torch.add": "Add",
    "torch.sub": "Sub",
    "torch.mul": "Mult",
    "torch.div": "Div",
    "torch.matmul": "MatMult",
    "torch.pow": "Pow",
}


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """A node and everything under it but operators and annotations, in no particular order."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        kind: Any = type(node)
        for name in _children(kind):
            value = getattr(node, name, None)
            if isinstance(value, list):
                stack += [item for item in value if isinstance(item, ast.AST)]
            elif isinstance(value, ast.AST):
                stack.append(value)


@cache
def _children(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in kind._fields if name not in _UNSAID | {"op", "ops"})


class Statement:
    """A top-level statement of a file and the names in it.

    Attributes:
        uses, binds: names that it reads; names that it gives the file.
        imports: local name -> full path, of every import in it.
        attributes: names of attributes that it sets, and of methods.
        parameters: names of parameters of its functions.
    """

    __slots__ = ("attributes", "binds", "imports", "node", "parameters", "uses")

    def __init__(self, node: ast.stmt) -> None:
        self.node = node
        self.uses: set[str] = set()
        self.binds: set[str] = set()
        self.imports: dict[str, str] = {}
        self.attributes: set[str] = set()
        self.parameters: set[str] = set()
        for part in parts(node):
            kind = type(part)
            if kind is ast.Name:
                (self.uses if type(part.ctx) is ast.Load else self.binds).add(part.id)  # type: ignore[attr-defined]
            elif kind is ast.Attribute:
                if type(part.ctx) is ast.Store:  # type: ignore[attr-defined]
                    self.attributes.add(part.attr)  # type: ignore[attr-defined]
            elif kind is ast.arg:
                self.parameters.add(part.arg)  # type: ignore[attr-defined]
            elif isinstance(part, ast.ClassDef):
                self.attributes |= {item.name for item in part.body if isinstance(item, DEFINITIONS)} - _PROTOCOL
            elif isinstance(part, ast.Import | ast.ImportFrom):
                self.imports |= dict(_imports(part))
        if isinstance(node, DEFINITIONS):
            self.binds = {node.name}


def file_tokens(statements: list[Statement]) -> list[str]:
    """The tokens of a file's statements.

    Raises:
        RecursionError: an expression is nested too deep.
    """
    writer = _Writer(statements)
    for statement in statements:
        writer.write(statement.node)
    return writer.tokens


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            yield alias.asname or alias.name, f"{node.module or ''}.{alias.name}"
        elif alias.asname:
            yield alias.asname, alias.name
        else:
            top = alias.name.split(".")[0]
            yield top, top


@dataclass(frozen=True)
class _Own:
    """What one file calls by names of its own choice, and the numbers that these have got so far."""

    names: frozenset[str]
    prefix: str
    numbers: dict[str, str]

    def number(self, name: str) -> str:
        return self.numbers.setdefault(name, f"{self.prefix}{len(self.numbers)}")


class _Writer:
    """Writes the nodes of one file, one after another."""

    def __init__(self, statements: list[Statement]) -> None:
        self.tokens: list[str] = []
        self._imported = {name: path for s in statements for name, path in s.imports.items()}
        self._file = _Own(frozenset(chain.from_iterable(s.binds for s in statements)) - _PROTOCOL, "@", {})
        self._attributes = _Own(frozenset(chain.from_iterable(s.attributes for s in statements)), ".@", {})
        self._keywords = _Own(frozenset(chain.from_iterable(s.parameters for s in statements)), "=@", {})
        # Names of the functions that enclose what is being written, outermost first.
        self._scopes: list[dict[str, str]] = []

    def write(self, node: ast.AST) -> None:
        """Append the tokens of a node and of everything under it."""
        kind: Any = type(node)
        method = _METHODS.get(kind)
        if method is not None:
            method(self, node)
            return
        self.tokens.append(kind.__name__)
        for name in _fields(kind):
            self._write_field(getattr(node, name, None))

    def _write_field(self, value: object) -> None:
        if isinstance(value, ast.AST):
            self.write(value)
        elif isinstance(value, list):
            for item in value:
                self._write_field(item)
            self.tokens.append(";")
        else:
            self.tokens.append("_" if value is None else str(value))

    def _named(self, name: str, stored: bool = False) -> str:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        if stored and self._scopes:
            scope = self._scopes[-1]
            return scope.setdefault(name, f"%{len(scope)}")
        if name in self._imported:
            return self._imported[name]
        return self._file.number(name) if name in self._file.names else name

    def _path(self, node: ast.expr) -> str | None:
        """The full path of a name in a library, or None."""
        if isinstance(node, ast.Attribute):
            path = self._path(node.value)
            return None if path is None else f"{path}.{node.attr}".replace("torch.nn.functional.", "torch.", 1)
        if isinstance(node, ast.Name) and node.id in self._imported and not any(node.id in s for s in self._scopes):
            return self._imported[node.id].replace("torch.nn.functional.", "torch.", 1)
        return None

    def _name(self, node: ast.Name) -> None:
        self.tokens.append(self._named(node.id, type(node.ctx) is ast.Store))

    def _attribute(self, node: ast.Attribute) -> None:
        path = self._path(node)
        if path is not None:
            self.tokens.append(path)
            return
        self.write(node.value)
        own = node.attr in self._attributes.names
        self.tokens.append(self._attributes.number(node.attr) if own else f".{node.attr}")

    def _call(self, node: ast.Call) -> None:
        function, arguments = node.func, list(node.args)
        path = self._path(function)
        is_method = isinstance(function, ast.Attribute) and path is None
        if is_method and function.attr not in self._attributes.names and not function.attr.startswith("__"):  # type: ignore[attr-defined]
            # x.abs() is torch.abs(x).
            path, arguments = f"torch.{function.attr}", [function.value, *arguments]  # type: ignore[attr-defined]
        if path in _OPERATORS and len(arguments) == 2 and not node.keywords:
            self.tokens.append(_OPERATORS[path])
            for item in arguments:
                self.write(item)
            return
        if path is None:
            self.write(function)
        else:
            self.tokens.append(path)
        self.tokens.append("(")
        # super() and super(Model, self) are the same.
        if not (isinstance(function, ast.Name) and function.id == "super"):
            for part in (*arguments, *node.keywords):
                self.write(part)
        self.tokens.append(")")

    def _keyword(self, node: ast.keyword) -> None:
        name = node.arg or "**"
        self.tokens.append(self._keywords.number(name) if name in self._keywords.names else f"={name}")
        self.write(node.value)

    def _constant(self, node: ast.Constant) -> None:
        self.tokens.append(repr(node.value))

    def _expression(self, node: ast.Expr) -> None:
        self.write(node.value)

    def _operation(self, node: ast.BinOp) -> None:
        self.tokens.append(type(node.op).__name__)
        self.write(node.left)
        self.write(node.right)

    def _assignment(self, node: ast.Assign) -> None:
        self.write(node.value)
        for target in node.targets:
            self.tokens.append("=")
            self.write(target)

    def _annotated(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.write(node.value)
            self.tokens.append("=")
            self.write(node.target)

    def _in_place(self, node: ast.AugAssign) -> None:
        """`x += y` as `x = x + y`."""
        self.tokens.append(type(node.op).__name__)
        self.write(node.target)
        self.write(node.value)
        self.tokens.append("=")
        self.write(node.target)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._decorators(node)
        self.tokens += ["def", self._defined(node.name)]
        self._signature_and_body(node.args, _without_text(node.body))

    def _lambda(self, node: ast.Lambda) -> None:
        self.tokens.append("lambda")
        self._signature_and_body(node.args, node.body)

    def _signature_and_body(self, arguments: ast.arguments, body: object) -> None:
        for default in (*arguments.defaults, *arguments.kw_defaults):
            self._write_field(default)
        self._scopes.append({})
        self.tokens += [self._named(a.arg, stored=True) for a in (*arguments.posonlyargs, *arguments.args)]
        if arguments.vararg:
            self.tokens += ["*", self._named(arguments.vararg.arg, stored=True)]
        if arguments.kwonlyargs:
            self.tokens += ["keyword-only", *(self._named(a.arg, stored=True) for a in arguments.kwonlyargs)]
        if arguments.kwarg:
            self.tokens += ["**", self._named(arguments.kwarg.arg, stored=True)]
        self.tokens.append(":")
        self._write_field(body)
        self._scopes.pop()

    def _class(self, node: ast.ClassDef) -> None:
        self._decorators(node)
        self.tokens += ["class", self._defined(node.name)]
        self._write_field(node.bases)
        self._scopes.append({})
        self._write_field([item for item in _without_text(node.body) if not _only_calls_super(item)])
        self._scopes.pop()

    def _decorators(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        for decorator in node.decorator_list:
            self.tokens.append("decorator")
            self.write(decorator)

    def _defined(self, name: str) -> str:
        if name in _PROTOCOL:
            return name
        if self._scopes and name in self._attributes.names:
            return self._attributes.number(name)
        return self._named(name, stored=True)

    def _comprehension(self, node: Any) -> None:
        self.tokens.append(type(node).__name__)
        self._scopes.append({})
        # What is bound comes before what is made of it.
        self._write_field(node.generators)
        for name in ("key", "value", "elt"):
            if hasattr(node, name):
                self.write(getattr(node, name))
        self._scopes.pop()

    def _nothing(self, node: ast.AST) -> None:
        """Imports: every name says where it comes from."""


_METHODS: dict[type[ast.AST], Callable[[_Writer, Any], None]] = {
    ast.Name: _Writer._name,
    ast.Attribute: _Writer._attribute,
    ast.Call: _Writer._call,
    ast.keyword: _Writer._keyword,
    ast.Constant: _Writer._constant,
    ast.Expr: _Writer._expression,
    ast.BinOp: _Writer._operation,
    ast.Assign: _Writer._assignment,
    ast.AnnAssign: _Writer._annotated,
    ast.AugAssign: _Writer._in_place,
    ast.FunctionDef: _Writer._function,
    ast.AsyncFunctionDef: _Writer._function,
    ast.Lambda: _Writer._lambda,
    ast.ClassDef: _Writer._class,
    ast.ListComp: _Writer._comprehension,
    ast.SetComp: _Writer._comprehension,
    ast.DictComp: _Writer._comprehension,
    ast.GeneratorExp: _Writer._comprehension,
    ast.Import: _Writer._nothing,
    ast.ImportFrom: _Writer._nothing,
}


@cache
def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in kind._fields if name not in _UNSAID)


def _only_calls_super(node: ast.stmt) -> bool:
    """An `__init__` that does what would be done without it."""
    if not (isinstance(node, ast.FunctionDef) and node.name == "__init__" and len(node.args.args) == 1):
        return False
    said = _without_text(node.body)
    return len(said) == 1 and ast.unparse(said[0]).startswith("super(") and ast.unparse(said[0]).endswith(".__init__()")


def _without_text(body: list[ast.stmt]) -> list[ast.stmt]:
    return [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
