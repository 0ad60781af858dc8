"""Code as a list of tokens that says what it computes and not how it is written down: what duplicates and
decontamination compare.

The tokens are those of the syntax tree, in the order of evaluation. Comments, docstrings, annotations, formatting, the
way a library is imported, `x.abs()` for `torch.abs(x)` and what nothing refers to are gone (`syntax_tokens` has the
rest). Names that the code itself chose are numbered by their first appearance, so that equal tokens mean the same
computation under other names. Code that does not parse is split into words and signs instead.

Knows nothing of files.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from triton_sft_pipeline.problems.loading import parse_module
from triton_sft_pipeline.problems.syntax_tokens import DEFINITIONS, Statement, file_tokens, parts

KERNEL_ROOTS = frozenset({"triton_kernel_wrapper", "ModelNew"})
_WORD = re.compile(r"#[^\n]*|\"\"\".*?\"\"\"|'''.*?'''|\"[^\"\n]*\"|'[^'\n]*'|[^\W\d]\w*|\d[\w.]*|\S", re.DOTALL)
# In characters. Parsing takes a few hundred bytes of memory for each; no kernel is so long.
_LONGEST = 1_000_000
# Tokens: those that code shares; the others are many, and seen once.
_REMEMBERED = 8_192
# As `parse_module`; the last two: an expression nested too deep.
_UNPARSED = (SyntaxError, ValueError, RecursionError, MemoryError)


def kernel_tokens(code: str) -> list[str]:
    """The normal form of a kernel: what `triton_kernel_wrapper` and `ModelNew` reach, or the whole file when it defines
    neither.
    """
    try:
        said = _statements(_parsed(code))
        roots = [s for s in said if isinstance(s.node, DEFINITIONS) and s.node.name in KERNEL_ROOTS]
        return file_tokens(_reached(said, roots))
    except _UNPARSED:
        return _words(code)


def module_tokens(pytorch_code: str) -> list[str]:
    """The normal form of a problem: its classes and what they reach, so without `get_inputs` and `get_init_inputs`. A
    variable that is used once, further down, is written where it is used.
    """
    try:
        tree = _parsed(pytorch_code)
        for node in parts(tree):
            if isinstance(node, ast.FunctionDef):
                _inline(node)
        said = _statements(tree)
        return file_tokens(_reached(said, [s for s in said if isinstance(s.node, ast.ClassDef)]))
    except _UNPARSED:
        return _words(pytorch_code)


def blurred(tokens: Sequence[str]) -> list[str]:
    """Tokens for n-grams: own names lose their numbers, powers of two from 16 on (block sizes) their value, and 1.0 is
    1. So one inserted line or one tuned constant changes the n-grams around it and no others.
    """
    return [_blur(token) for token in tokens]


def tokens_hash(tokens: Sequence[str]) -> str:
    """Hex SHA-256 of a token list."""
    return hashlib.sha256("\n".join(tokens).encode("utf-8", "surrogatepass")).hexdigest()


def shingles(tokens: Sequence[str], size: int = 5) -> Any:
    """The set of token n-grams.

    Args:
        tokens: usually `blurred`. Fewer than `size` of them make one n-gram, none make none.
        size: n, in tokens.

    Returns:
        A sorted numpy array of unique 64-bit hashes (uint64), the same on every machine.
    """
    import numpy as np

    codes = np.fromiter((_code(token) for token in tokens), dtype=np.uint64, count=len(tokens))
    width = min(size, len(codes))
    if not width:
        return codes
    count = len(codes) - width + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(width):
        # Multiply and add, wrapping; the shift lets high bits reach the low ones.
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[place : place + count]
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


@lru_cache(maxsize=_REMEMBERED)
def _code(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@lru_cache(maxsize=_REMEMBERED)
def _blur(token: str) -> str:
    if token.rstrip("0123456789") in ("%", "@", ".@", "=@"):
        return token.rstrip("0123456789")
    if token.endswith(".0") and token[:-2].isdecimal():
        token = token[:-2]
    if token.isdecimal() and len(token) < 10 and int(token) >= 16 and int(token).bit_count() == 1:
        return "2**n"
    return token


def _parsed(code: str) -> ast.Module:
    if len(code) > _LONGEST:
        raise ValueError("too long to parse")
    return parse_module(code)


def _words(code: str) -> list[str]:
    if len(code) > _LONGEST:
        return [tokens_hash(code.split())]
    return [word for word in _WORD.findall(code) if not word.startswith("#")]


def _statements(tree: ast.Module) -> list[Statement]:
    """The file's own statements, without its script part and bare text."""
    return [Statement(node) for node in tree.body if not _is_idle(node)]


def _is_idle(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return any(isinstance(part, ast.Name) and part.id == "__name__" for part in parts(node.test))
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _reached(said: list[Statement], roots: list[Statement]) -> list[Statement]:
    """The statements that the roots reach by name, in the order of the file; all of them when there are no roots.
    Imports stay.
    """
    if not roots:
        return said
    found, waiting = {id(s) for s in said if s.imports} | {id(s) for s in roots}, roots
    while waiting:
        used = set().union(*(s.uses for s in waiting))
        waiting = [s for s in said if id(s) not in found and s.binds & used]
        found |= {id(s) for s in waiting}
    return [s for s in said if id(s) in found]


def _inline(function: ast.FunctionDef) -> None:
    """Write the value of a variable where it is used, when that is once, later and comes to the same."""
    body = [_plain(node) for node in function.body]
    uses = [_names(node, ast.Load) for node in body]
    sets = [_names(node, ast.Store) for node in body]
    left = []
    for index, node in enumerate(body):
        name = _variable(node)
        user = None if name is None else _only_use(name, index, body, uses, sets)
        if name is None or user is None:
            left.append(node)
            continue
        _Replacement(name, node.value).visit(body[user])  # type: ignore[attr-defined]
        uses[user] = uses[user] - Counter([name]) + uses[index]
    function.body = left


def _plain(node: ast.stmt) -> ast.stmt:
    """`x: int = 1` as `x = 1`, and `x += 1` as `x = x + 1`."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return ast.Assign(targets=[node.target], value=node.value)
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.Assign(targets=[node.target], value=value)
    return node


def _variable(node: ast.stmt) -> str | None:
    """The one variable that a statement sets."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _only_use(
    name: str, index: int, body: list[ast.stmt], uses: list[Counter[str]], sets: list[Counter[str]]
) -> int | None:
    """The one simple statement after `index` that uses the name, when nothing in between can change its value."""
    user = None
    for later in range(index + 1, len(body)):
        if uses[later][name]:
            if user is not None or uses[later][name] > 1 or not isinstance(body[later], _SIMPLE):
                return None
            user = later
        if user is None and (_variable(body[later]) is None or sets[later] & uses[index]):
            return None
        if sets[later][name]:
            # It is set again: what follows is no use of this value.
            return user if isinstance(body[later], ast.Assign) else None
    return user


_SIMPLE = (ast.Assign, ast.Return, ast.Expr)


def _names(node: ast.AST, context: type[ast.expr_context]) -> Counter[str]:
    return Counter(part.id for part in parts(node) if isinstance(part, ast.Name) and isinstance(part.ctx, context))


class _Replacement(ast.NodeTransformer):
    def __init__(self, name: str, value: ast.expr) -> None:
        self._name, self._value = name, value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._value if node.id == self._name and isinstance(node.ctx, ast.Load) else node
