"""Looks at a kernel's source before anything runs: refuses what cannot be judged, and what only an attack needs.

Executes nothing. It follows names through scopes, imports and plain renaming (`F = torch.nn.functional`) and compares
the dotted paths they stand for with the tables of `forbidden`. A parameter or local variable may have any name, also
`input` or `compile`. It knows nothing of values: what hides in data, such as a class that came out of a list, is for
the checks of the run. Code that is never run is not looked at: the block under `if __name__ == "__main__"`, as no
kernel is loaded by that name, and functions that nothing mentions, such as the self-tests this block calls.
"""

from __future__ import annotations

import ast
import threading
import warnings

from triton_sft_pipeline.verification import forbidden
from triton_sft_pipeline.verification.scopes import (
    MODEL_CLASS,
    WRAPPER,
    Comprehension,
    Function,
    Scope,
    Scoped,
    dormant_functions,
    harmless_places,
    is_main_block,
    is_named,
    own_nodes,
    parts_of_type,
    renaming_of,
    scope_of,
)
from triton_sft_pipeline.verification.verdict import Finding

__all__ = ["MODEL_CLASS", "WRAPPER", "inspect_source"]

# The warnings filter belongs to the whole process, and the judge inspects in many threads.
_PARSING = threading.Lock()

# Objects that belong to the code that assigns their attributes, by what everyone calls them.
_OWN_OBJECTS = ("self", "ctx")
# Their meaning is relied on below.
_RESERVED = frozenset(("__name__", "__builtins__", "isinstance", "issubclass", "getattr", "hasattr"))
_REFLECTION = ("builtins.getattr", "builtins.hasattr", "builtins.setattr", "builtins.delattr")
_ENVIRONMENT = ("os.environ", "os.environ.get", "os.getenv")


def inspect_source(triton_code: str | None) -> Finding | None:
    """The reason why this code needs no run, or None when it may be run."""
    if not triton_code or not triton_code.strip():
        return Finding("no_code", "There is no kernel code; check that the model's answer was parsed.")
    try:
        tree = _parse(triton_code)
    except SyntaxError as error:
        return Finding("syntax_error", f"Line {error.lineno}: {error.msg}.")
    # ValueError: a null byte; RecursionError and MemoryError: an expression nested too deep for the parser.
    except (ValueError, RecursionError, MemoryError) as error:
        return Finding("syntax_error", f"The code cannot be parsed: {error}.")
    try:
        return _inspect_tree(tree)
    except RecursionError:
        return Finding("forbidden_construct", "An expression is nested too deep to be inspected; split it up.")


def _parse(code: str) -> ast.Module:
    with _PARSING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def _inspect_tree(tree: ast.Module) -> Finding | None:
    if not _defined_names(tree.body) & {WRAPPER, MODEL_CLASS}:
        return Finding("missing_wrapper", f"Define {WRAPPER}(...), or KernelBench's class {MODEL_CLASS}.")
    inspector = _Inspector(tree)
    if inspector.refusals:
        _, refusal = min(inspector.refusals, key=lambda item: item[0])
        return refusal
    if not inspector.has_kernel:
        return Finding(
            "no_kernel_launch", "There is no Triton kernel; write the computation in a @triton.jit function."
        )
    return None


def _defined_names(body: list[ast.stmt]) -> set[str]:
    """Names bound at the top level, also inside its if, try and with blocks."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.If | ast.Try | ast.With) and not is_main_block(node):
            inner = [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
            names |= _defined_names([child for child in inner if not isinstance(child, ast.If | ast.Try | ast.With)])
    return names


class _Inspector(ast.NodeVisitor):
    """Walks the code that runs and collects refusals, each with its line.

    Attributes:
        refusals: line number and finding, in no order.
        has_kernel: a function is made a Triton kernel, or a module that is not installed may bring one.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.refusals: list[tuple[int, Finding]] = []
        self.has_kernel = False
        self._scopes: list[Scope] = []
        self._dormant = dormant_functions(tree)
        self._harmless = {id(node) for parent in ast.walk(tree) for node in harmless_places(parent)}
        self._kernels: set[str] = set()
        self._changed: list[tuple[ast.Attribute, str]] = []
        self._enter(tree, tree.body)
        for node, name in self._changed:
            if name in self._kernels:
                self._refuse_as(node, f"changing the kernel {name}", "harness_tamper", "only launch it")
            elif node.attr in forbidden.KERNEL_PARTS:
                self._refuse_as(node, f"changing .{node.attr}", "harness_tamper", "a kernel is only launched")

    def _refuse(self, node: ast.AST, what: str, rule: forbidden.Rule | None) -> None:
        if rule is not None:
            line = getattr(node, "lineno", 1)
            self.refusals.append((line, Finding(rule.verdict, f"Line {line}: {what} is refused: {rule.advice}.")))

    def _refuse_as(self, node: ast.AST, what: str, verdict: str, advice: str) -> None:
        self._refuse(node, what, forbidden.Rule(verdict, advice))

    # Scopes

    def _enter(self, node: ast.Module | Scoped, body: list[ast.stmt] | list[ast.expr]) -> None:
        scope = scope_of(node)
        for name in scope.origins.keys() & _RESERVED:
            self._refuse_as(node, f"binding {name}", "harness_tamper", "others rely on it; use another name")
        if scope.is_class or scope.outer:
            # What a class or an outer scope gets to know is reached from elsewhere, which is not followed.
            self._harmless -= {id(origin) for name, origin in _renamed(body) if scope.is_class or name in scope.outer}
        self._scopes.append(scope)
        for child in body:
            self.visit(child)
        self._scopes.pop()

    def _visit_all(self, *nodes: ast.AST | None) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def _function(self, node: Function) -> None:
        self._refuse(node, f"def {node.name}", forbidden.refusal_of_definition(node.name))
        self._visit_all(*node.decorator_list, node.args, node.returns)
        decorators = [item.func if isinstance(item, ast.Call) else item for item in node.decorator_list]
        if any(path.startswith("triton.") for item in decorators for path in self._paths(item)):
            self._kernels.add(node.name)
        if id(node) not in self._dormant:
            self._enter(node, node.body)

    visit_FunctionDef = _function
    visit_AsyncFunctionDef = _function

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        self._enter(node, [node.body])

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [path for base in node.bases for path in self._paths(base)]
        if forbidden.TENSOR_CLASSES.intersection(bases):
            self._refuse_as(node, "a subclass of torch.Tensor", "lazy_output", "return plain tensors")
        for keyword in node.keywords:
            if keyword.arg == "metaclass" and self._paths(keyword.value) != ["abc.ABCMeta"]:
                self._refuse_as(node, "a metaclass", "forbidden_construct", "write a plain class")
        self._visit_all(*node.decorator_list, *node.bases, *node.keywords)
        self._enter(node, node.body)

    def _comprehension(self, node: Comprehension) -> None:
        # The first iterable is evaluated outside.
        self.visit(node.generators[0].iter)
        result = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        later = [generator.iter for generator in node.generators[1:]]
        conditions = [condition for generator in node.generators for condition in generator.ifs]
        targets = [generator.target for generator in node.generators]
        self._enter(node, [*targets, *later, *conditions, *result])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def visit_If(self, node: ast.If) -> None:
        if len(self._scopes) == 1 and is_main_block(node):
            self._visit_all(*node.orelse)
        else:
            self.generic_visit(node)

    # Names and paths

    def _paths(
        self, node: ast.AST, depth: int | None = None, seen: frozenset[tuple[int, str]] = frozenset()
    ) -> list[str]:
        """The dotted paths that an expression may stand for; none for what the code made itself."""
        if isinstance(node, ast.Attribute):
            return [f"{path}.{node.attr}" for path in self._paths(node.value, depth, seen)]
        if not isinstance(node, ast.Name):
            return []
        depth = len(self._scopes) if depth is None else depth
        builtin = f"builtins.{node.id}"
        for index in reversed(range(depth)):
            scope = self._scopes[index]
            if node.id not in scope.origins or (scope.is_class and index < depth - 1):
                continue
            if (index, node.id) in seen:
                break
            inner = seen | {(index, node.id)}
            paths: list[str] = []
            for origin in scope.origins[node.id]:
                paths += [origin] if isinstance(origin, str) else self._paths(origin, index + 1, inner)
            # Outside functions a name can still be the builtin, before it is bound and after it is deleted.
            may_be_builtin = not scope.local and forbidden.refusal_of_path(builtin)
            return paths or ([builtin] if may_be_builtin else [])
        return [builtin]

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._import(node, alias.name)
            self._refuse_elsewhere(node, alias.asname or alias.name.partition(".")[0])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            self._refuse_as(node, "a relative import", "import_error", "a kernel is one file and has no package")
            return
        for alias in node.names:
            if alias.name == "*":
                self._refuse_as(node, f"from {node.module} import *", "forbidden_construct", "name what is imported")
            else:
                self._import(node, f"{node.module}.{alias.name}")
                self._refuse_elsewhere(node, alias.asname or alias.name)

    def _refuse_elsewhere(self, node: ast.AST, name: str) -> None:
        if self._scopes[-1].is_class or name in self._scopes[-1].outer:
            advice = "import at the top of the file or in the function that needs it"
            self._refuse_as(node, "importing for another scope", "harness_tamper", advice)

    def _import(self, node: ast.AST, path: str) -> None:
        self._refuse(node, f"importing {path}", forbidden.refusal_of_path(path))
        self._refuse_dunders(node, path)
        self.has_kernel |= forbidden.is_unknown_module(path)

    def _refuse_dunders(self, node: ast.AST, path: str) -> None:
        for name in path.split(".")[1:]:
            self._refuse(node, f".{name}", forbidden.refusal_of_attribute(name))

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._path(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        paths = self._paths(node)
        is_own = is_named(node.value, _OWN_OBJECTS)
        self._refuse(node, f".{node.attr}", forbidden.refusal_of_attribute(node.attr, is_own))
        if not isinstance(node.ctx, ast.Load):
            self._change(node, paths)
        elif paths:
            self._path(node)
            for path in paths:
                self._refuse_dunders(node, path.rpartition(".")[0])
        if not paths:
            self.visit(node.value)

    def _path(self, node: ast.Name | ast.Attribute) -> None:
        is_harmless = id(node) in self._harmless
        for path in self._paths(node):
            self.has_kernel |= path in forbidden.JIT
            if not (is_harmless and path in _ENVIRONMENT):
                self._refuse(node, _shown(path), forbidden.refusal_of_path(path))
            if not is_harmless and path in forbidden.MODULES | forbidden.CLASSES:
                advice = "it could be changed under another name; name it where it is used"
                self._refuse_as(node, f"passing {path} around", "harness_tamper", advice)
            if not is_harmless and path in _REFLECTION:
                self._refuse_as(node, f"passing {_shown(path)} around", "forbidden_construct", "call it directly")

    # Changes and calls

    def _change(self, node: ast.Attribute, paths: list[str]) -> None:
        for path in paths:
            self._refuse(node, f"changing {_shown(path)}", forbidden.refusal_of_change(path))
        root = _root(node)
        if not paths and not is_named(root, _OWN_OBJECTS):
            self._changed.append((node, root.id if isinstance(root, ast.Name) else ""))
        is_class = any(isinstance(part, ast.Attribute) and part.attr == "__class__" for part in ast.walk(node.value))
        if is_class or (isinstance(root, ast.Call) and is_named(root.func, ("type",))) or node.attr == "__class__":
            self._refuse_as(node, "changing a class", "harness_tamper", "keep state in objects of your own")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if "os.environ" in self._paths(node.value):
            if not isinstance(node.ctx, ast.Load):
                advice = "pass settings as arguments of the kernel"
                self._refuse_as(node, "changing the environment", "harness_tamper", advice)
            self._variable(node, [node.slice])
        if self._paths(node.value):
            # As in Optional[torch.Tensor]. An object of the code's own would be handed what stands between brackets.
            self._harmless |= {id(place) for place in parts_of_type(node.slice)}
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops):
            # The other side may define what == does, and would be handed the module.
            self._harmless -= {id(part) for part in ast.walk(node) if forbidden.MODULES.intersection(self._paths(part))}
        self.generic_visit(node)

    def visit_MatchClass(self, node: ast.MatchClass) -> None:
        for name in node.kwd_attrs:
            self._refuse(node, f"a pattern that reads .{name}", forbidden.refusal_of_pattern(name))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for path in self._paths(node.func):
            if path in ("os.getenv", "os.environ.get"):
                self._variable(node, node.args)
            elif path in _REFLECTION:
                self._reflection(node, path)
            elif path == "builtins.type" and len(node.args) + len(node.keywords) != 1:
                self._refuse_as(node, "type() with several arguments", "forbidden_construct", "write the class")
        self.generic_visit(node)

    def _variable(self, node: ast.AST, arguments: list[ast.expr]) -> None:
        name = _text(arguments[0]) if arguments else None
        if name is None or not name.startswith(forbidden.READABLE_VARIABLES):
            advice = f"only variables that start with {', '.join(forbidden.READABLE_VARIABLES)} may be read"
            self._refuse_as(node, "reading the environment", "sandbox_violation", advice)

    def _reflection(self, node: ast.Call, path: str) -> None:
        """getattr and its kin: with a constant name they are judged as the attribute they stand for."""
        called = _shown(path)
        if len(node.args) < 2 or any(isinstance(argument, ast.Starred) for argument in node.args):
            self._refuse_as(node, f"{called} without plain arguments", "forbidden_construct", "write the attribute out")
            return
        target, name = node.args[0], _text(node.args[1])
        paths, is_own = self._paths(target), is_named(_root(target), _OWN_OBJECTS)
        if path in ("builtins.setattr", "builtins.delattr") and (paths or not is_own):
            advice = "assign the attributes of self or of objects of your own by name"
            self._refuse_as(node, f"{called} on something else than self", "harness_tamper", advice)
        elif name is None and (paths or not is_own or not _beginning(node.args[1])[:1].isalpha()):
            advice = 'write the attribute out, look it up in a dict of your own, or use self and a name like f"conv{i}"'
            self._refuse_as(node, f"{called} with a computed name", "forbidden_construct", advice)
        if name is not None:
            self._refuse(node, f"{called} of {name}", forbidden.refusal_of_attribute(name, is_own))
            for owner in paths:
                self._refuse(node, f"{owner}.{name}", forbidden.refusal_of_path(f"{owner}.{name}"))


def _renamed(body: list[ast.stmt] | list[ast.expr]) -> list[tuple[str, ast.expr]]:
    """The names and expressions of each `name = a.b.c` in a scope."""
    found = [renaming for node in own_nodes([*body]) if (renaming := renaming_of(node)) is not None]
    return [(name, origin) for name, origins in found for origin in origins if isinstance(origin, ast.expr)]


def _root(node: ast.AST) -> ast.AST:
    """What an expression like `a.b[0].c` starts with."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _beginning(node: ast.AST) -> str:
    """The constant text that a computed one such as f"conv{i}" or "conv" + str(i) starts with."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return _beginning(node.values[0])
    if isinstance(node, ast.BinOp):
        return _beginning(node.left)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _beginning(node.func.value)
    return _text(node) or ""


def _shown(path: str) -> str:
    return path.removeprefix("builtins.")
