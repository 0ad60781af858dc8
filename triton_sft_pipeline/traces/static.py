"""What a kernel's syntax tree says about it: is it Python, does it define a wrapper, does it launch a Triton kernel,
and does it leave the heavy work to PyTorch. Executes nothing.

It errs on the kernel's side: names are followed through imports and plain renaming only, code that the wrapper cannot
reach does not count, nor does a fallback for machines without a GPU. The judge, which runs the kernel, has the last
word; this keeps what is plainly no Triton kernel out of the training data where no judge has looked.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from triton_sft_pipeline.problems.loading import parse_module
from triton_sft_pipeline.problems.operators import (
    CONTRACTION,
    WEIGHT,
    Work,
    children,
    imported_paths,
    path_of,
    target_names,
    walk,
    work_of,
)
from triton_sft_pipeline.traces.reasoning import MODEL_CLASS, WRAPPER
from triton_sft_pipeline.traces.schemas import LONGEST_CODE

# PyTorch's compilers write the kernel themselves.
_COMPILERS = ("torch.compile", "torch.jit.script", "torch.jit.trace", "torch._inductor", "torch._dynamo.optimize")

# What a test names that asks where the code runs. Behind it stands what happens without a GPU or without Triton.
_MACHINE = frozenset(["is_cuda", "is_cpu", "device", "is_available", "cpu", "cuda"])

_INPUT_FUNCTIONS = frozenset(("get_inputs", "get_init_inputs"))
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class KernelFacts:
    """What a kernel's source says.

    Attributes:
        syntax_error: why it is no Python, or None; then nothing else is known.
        has_wrapper: it defines triton_kernel_wrapper or ModelNew.
        has_kernel: it makes a function a Triton kernel.
        launches: code that the wrapper can reach uses such a function.
        compiler: the PyTorch compiler that such code calls, or None.
        has_dot: a Triton kernel multiplies matrices; only looked for beside heavy work.
        work: heavy PyTorch operators that such code calls.
    """

    syntax_error: str | None = None
    has_wrapper: bool = True
    has_kernel: bool = True
    launches: bool = True
    compiler: str | None = None
    has_dot: bool = False
    work: Work = field(default_factory=Work)


@lru_cache(maxsize=4)
def kernel_facts(triton_code: str) -> KernelFacts:
    """Read a kernel's source; remembered from one step of the filter to the next."""
    if len(triton_code) > LONGEST_CODE:
        return KernelFacts(f"{len(triton_code):,} characters are more than any kernel has ({LONGEST_CODE:,})")
    try:
        tree = parse_module(triton_code)
    except SyntaxError as error:
        return KernelFacts(f"line {error.lineno}: {error.msg}")
    # ValueError: a null byte; the others: an expression nested too deep.
    except (ValueError, RecursionError, MemoryError) as error:
        return KernelFacts(str(error) or "nested too deeply")
    try:
        return _Source(tree).facts()
    except RecursionError:
        # It is Python, and that is all that is known: no reason to refuse it.
        return KernelFacts()


@lru_cache(maxsize=4)
def module_work(pytorch_code: str) -> Work:
    """The heavy operators of a PyTorch module, as far as they surely run: not what stands under an `if` without an
    `else` (`if a.shape != b.shape: a = F.interpolate(a, ...)`). None when it is no Python.
    """
    if len(pytorch_code) > LONGEST_CODE:
        return Work()
    try:
        tree = parse_module(pytorch_code)
        body = [n for n in tree.body if not (isinstance(n, _Function) and n.name in _INPUT_FUNCTIONS)]
        return work_of(_surely(body), imported_paths(walk(tree)), built_counts=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Work()


def fallback_of(facts: KernelFacts, module: Work) -> str | None:
    """Which work a kernel leaves to PyTorch that it must not, as half a sentence, or None.

    It must not leave more than half of the calls of the module's heaviest kind: of the contractions where there are
    any, else of the operators that take several passes over the data. A kernel that multiplies matrices itself may call
    a matrix product beside it: which of them is the small one only a run can tell.
    """
    if facts.compiler:
        return f"{facts.compiler} lets PyTorch write the kernel"
    weight = max((WEIGHT[family] for family in module.calls), default=0)
    if weight == 0 or (weight == CONTRACTION and facts.has_dot):
        return None
    heaviest = {family: count for family, count in module.calls.items() if WEIGHT[family] == weight}
    left = {family: min(count, facts.work.calls[family]) for family, count in heaviest.items()}
    if 2 * sum(left.values()) <= sum(heaviest.values()):
        return None
    family = max(left, key=lambda name: left[name])
    return f"{facts.work.names[family]} does the module's {family}"


class _Source:
    """A kernel's source, with what is needed to ask about it."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        nodes = list(walk(tree))
        self.paths = imported_paths(nodes)
        jitted = [n for n in nodes if isinstance(n, _Function) and any(map(self._makes_kernel, n.decorator_list))]
        wrapped = [n for n in nodes if isinstance(n, ast.Call) and path_of(n.func, self.paths) in _JIT and n.args]
        self.kernel_names = {n.name for n in jitted}
        names = {n.args[0].id for n in wrapped if isinstance(n.args[0], ast.Name)}
        jitted += [n for n in nodes if isinstance(n, _Function) and n.name in names]
        self.kernels = {id(n) for n in jitted}
        self.has_kernel = bool(jitted or wrapped)
        for node in nodes:
            if wrapped and isinstance(node, ast.Assign) and any(id(c) in map(id, wrapped) for c in walk(node.value)):
                self.kernel_names |= {name for target in node.targets for name in target_names(target)}
        self.jitted = jitted

    def _makes_kernel(self, decorator: ast.expr) -> bool:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        return path_of(target, self.paths) in _JIT

    def facts(self) -> KernelFacts:
        definitions = dict(_definitions(self.tree.body))
        names = {name for node in self.tree.body for name in _bound_names(node)} | set(definitions)
        if not names & {WRAPPER, MODEL_CLASS}:
            return KernelFacts(has_wrapper=False, has_kernel=self.has_kernel)
        reached, mentioned = self._reached(definitions)
        host = list(self._host(reached, guarded=False))
        work = work_of(host, self.paths)
        return KernelFacts(
            has_kernel=self.has_kernel,
            launches=bool(mentioned & (self.kernel_names | _DYNAMIC)) or self._builds_kernel(host),
            compiler=self._compiler(host),
            has_dot=bool(work.calls) and self._has_dot(),
            work=work,
        )

    def _has_dot(self) -> bool:
        attributes = (n.attr for n in walk(*self.jitted) if isinstance(n, ast.Attribute))
        return any(name in ("dot", "dot_scaled") for name in attributes)

    def _builds_kernel(self, host: list[ast.AST]) -> bool:
        """`triton.jit(function)[grid](...)`, without a name in between."""
        built = (n.value for n in host if isinstance(n, ast.Subscript) and isinstance(n.value, ast.Call))
        return any(path_of(call.func, self.paths) in _JIT for call in built)

    def _compiler(self, host: list[ast.AST]) -> str | None:
        found = (path_of(n, self.paths) for n in host if isinstance(n, ast.Attribute | ast.Name))
        return next((p for p in found if any(p == c or p.startswith(f"{c}.") for c in _COMPILERS)), None)

    def _reached(self, definitions: dict[str, list[ast.stmt]]) -> tuple[list[ast.stmt], set[str]]:
        """The wrapper, what runs on import, and every function and class that these name, and so on; and all names."""
        top = [n for n in _outside_definitions(self.tree.body) if not isinstance(n, ast.Import | ast.ImportFrom)]
        reached: list[ast.stmt] = []
        waiting = [*top, *(n for name in (WRAPPER, MODEL_CLASS) for n in definitions.get(name, []))]
        seen: set[int] = set()
        mentioned: set[str] = set()
        while waiting:
            node = waiting.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            reached.append(node)
            names = set(_mentioned(self._host([node])))
            if names & _DYNAMIC:
                names |= set(definitions)
            mentioned |= names
            waiting += [n for name in names for n in definitions.get(name, [])]
        return reached, mentioned

    def _host(self, nodes: Iterable[ast.AST], guarded: bool = True) -> Iterator[ast.AST]:
        """These nodes and all below them that run on the host: not the insides of Triton kernels.

        Args:
            guarded: also what happens on machines without a GPU, and after an error.
        """
        waiting: list[ast.AST] = list(nodes)
        while waiting:
            node = waiting.pop()
            if id(node) in self.kernels:
                continue
            yield node
            if not guarded and isinstance(node, ast.ExceptHandler):
                continue
            if not guarded and isinstance(node, ast.If | ast.IfExp) and _asks_for_machine(node.test):
                # Which branch is the GPU's only the test knows: neither is held against the kernel.
                continue
            waiting.extend(children(node))


_JIT = frozenset(("triton.jit", "triton.runtime.jit", "triton.runtime.jit.jit", "triton.experimental.gluon.jit", "jit"))
# Whoever uses these may name anything.
_DYNAMIC = frozenset(("globals", "locals", "eval", "exec", "vars"))


def _surely(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        if not (isinstance(node, ast.If) and (not node.orelse or _is_main_block(node))):
            waiting.extend(children(node))


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, list[ast.stmt]]]:
    found: dict[str, list[ast.stmt]] = {}
    for node in _flat(body):
        if isinstance(node, _Function | ast.ClassDef):
            found.setdefault(node.name, []).append(node)
    yield from found.items()


def _outside_definitions(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    return (n for n in _flat(body) if not isinstance(n, _Function | ast.ClassDef))


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of the top level, those inside its if, try and with blocks among them; no block under __main__."""
    for node in body:
        if _is_main_block(node):
            continue
        if isinstance(node, ast.If | ast.Try | ast.With):
            parts = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
            parts += [handler.body for handler in getattr(node, "handlers", [])]
            for part in parts:
                yield from _flat(part)
        else:
            yield node


def _bound_names(node: ast.stmt) -> Iterator[str]:
    for inner in _flat([node]):
        if isinstance(inner, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in inner.names)
        elif isinstance(inner, ast.Assign | ast.AnnAssign):
            for target in inner.targets if isinstance(inner, ast.Assign) else [inner.target]:
                yield from target_names(target)


def _mentioned(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def _asks_for_machine(test: ast.expr) -> bool:
    names = {*_mentioned(walk(test))}
    names |= {n.value for n in walk(test) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return bool(names & _MACHINE) or any("triton" in name.lower() for name in names)


def _is_main_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == "__name__" for n in walk(node.test))
