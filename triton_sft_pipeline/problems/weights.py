"""Which weights a problem downloads when it runs, and whether the Hub's local cache holds them. Executes nothing.

KernelBench's level 4 is made of such problems: `AutoModelForCausalLM.from_pretrained(self.model_name)`, where the name
is a constant somewhere else in the file. Names are followed through assignments, attributes, parameters and
`get_init_inputs`; one that is worked out in another way is told as it is written.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from triton_sft_pipeline.problems.loading import parse_module
from triton_sft_pipeline.problems.operators import children, imported_paths, last_name, path_of, walk

_FROM_HUB = "from_pretrained"
# What else downloads; none of it has a cache that could be asked.
_DOWNLOADS = frozenset(
    {
        "torch.hub.load",
        "torch.hub.load_state_dict_from_url",
        "torch.utils.model_zoo.load_url",
        "huggingface_hub.hf_hub_download",
        "huggingface_hub.snapshot_download",
        "transformers.pipeline",
    }
)
_MODEL_LIBRARIES = ("torchvision.", "timm.")

_TOKENIZERS = ("Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

_DEPTH = 12
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True)
class Needed:
    """Something that a problem loads from outside.

    Attributes:
        name: the repository's, or the argument as it is written when that is worked out at run time.
        what: "config", "tokenizer", "weights" or "download"; nothing but the first three can be in the Hub's cache.
        revision: of the repository; None is the default branch.
    """

    name: str
    what: str
    revision: str | None = None


def missing_weights(pytorch_code: str) -> str | None:
    """Why a problem cannot run here for want of weights, as a sentence, or None when nothing is missing.

    Args:
        pytorch_code: code that parses.
    """
    if not any(word in pytorch_code for word in (_FROM_HUB, "torch", "huggingface_hub", "transformers", "timm")):
        return None
    missing = dict.fromkeys(need.name for need in needed_weights(pytorch_code) if not _is_here(need))
    if not missing:
        return None
    return (
        f"It needs {', '.join(missing)} from the Hub, and the local cache does not hold all of it: fetch it once where "
        f"there is a network (hf download {next(iter(missing))})."
    )


def hub_models(codes: Iterable[str]) -> list[str]:
    """The repositories of the Hub that problems load, by name, each once; code that does not parse loads nothing.

    Args:
        codes: the problems' modules.
    """
    names: set[str] = set()
    for code in codes:
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            names |= {need.name for need in needed_weights(code) if need.what != "download" and _is_name(need.name)}
    return sorted(names)


def needed_weights(pytorch_code: str) -> list[Needed]:
    """What a problem loads from outside, in the order of its code.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: the code does not parse.
    """
    source = _Source(parse_module(pytorch_code))
    return list(dict.fromkeys(need for call, scope in source.calls for need in _needs(source, call, scope)))


def _needs(source: _Source, call: ast.Call, scope: _Scope) -> Iterator[Needed]:
    path = path_of(call.func, source.paths)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    if last_name(call.func) == _FROM_HUB and isinstance(call.func, ast.Attribute):
        given = call.args[0] if call.args else keywords.get("pretrained_model_name_or_path")
        if given is not None:
            revision = source.text(keywords["revision"], scope) if "revision" in keywords else None
            name = source.text(given, scope) or f"`{ast.unparse(given)}`"
            yield Needed(name, _what(last_name(call.func.value)), revision)
    elif path in _DOWNLOADS:
        first = call.args[0] if call.args else next(iter(keywords.values()), None)
        yield Needed((source.text(first, scope) if first is not None else None) or path, "download")
    elif path.startswith(_MODEL_LIBRARIES) and any(_asks(keywords.get(n)) for n in ("weights", "pretrained")):
        yield Needed(path, "download")


def _what(of: str) -> str:
    if of.endswith("Config"):
        return "config"
    return "tokenizer" if of.endswith(_TOKENIZERS) else "weights"


def _asks(value: ast.expr | None) -> bool:
    """Whether `weights=...` or `pretrained=...` asks for weights."""
    return value is not None and not (isinstance(value, ast.Constant) and value.value in (None, False))


def _is_name(text: str) -> bool:
    """Whether this is a repository's name: not code that makes one, and no folder, as transformers takes it."""
    return not text.startswith("`") and not Path(text).is_dir()


def _is_here(need: Needed) -> bool:
    """Whether the local cache holds what is needed; a local folder of that name counts, as it does to transformers."""
    if need.what == "download":
        return False
    if not need.name.startswith("`") and Path(need.name).is_dir():
        return True
    if need.what == "tokenizer":
        return any(_cached(need, name) for name in (*_TOKENIZER_FILES, *_PROCESSOR_FILES))
    if not _cached(need, "config.json"):
        return False
    return need.what == "config" or any(_has_weights(need, name) for name in _WEIGHTS)


def _has_weights(need: Needed, name: str) -> bool:
    """Whether one file of weights is cached, or all of its shards."""
    if _cached(need, name):
        return True
    index = _cached(need, f"{name}.index.json")
    if index is None:
        return False
    from triton_sft_pipeline.files import read_json

    try:
        shards = set(read_json(Path(index))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(shards) and all(_cached(need, shard) for shard in shards)


def _cached(need: Needed, name: str) -> str | None:
    """The path of a repository's file in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(need.name, name, revision=need.revision)
    except HFValidationError:
        return None  # No name that a repository could have.
    # Else it is known not to exist there, or not known at all.
    return found if isinstance(found, str) else None


@dataclass(frozen=True)
class _Scope:
    """Where an expression stands: the innermost function, and the class around it."""

    function: _Function | None = None
    inside: ast.ClassDef | None = None


_Value = tuple[ast.expr, _Scope]


@dataclass
class _Assigned:
    """name -> the expressions that it is given, in the order of the code."""

    top: dict[str, list[_Value]] = field(default_factory=dict)
    local: dict[tuple[int, str], list[_Value]] = field(default_factory=dict)
    attribute: dict[str, list[_Value]] = field(default_factory=dict)

    def add(self, target: ast.expr, value: ast.expr, scope: _Scope) -> None:
        if isinstance(target, ast.Attribute):
            self.attribute.setdefault(target.attr, []).append((value, scope))
        elif isinstance(target, ast.Name):
            if scope.function is not None:
                self.local.setdefault((id(scope.function), target.id), []).append((value, scope))
            elif scope.inside is not None:
                self.attribute.setdefault(target.id, []).append((value, scope))
            else:
                self.top.setdefault(target.id, []).append((value, scope))


class _Source:
    """A problem's code, ready to be asked what a name in it stands for.

    Attributes:
        calls: every call and where it stands, in the order of the code; not those in the script part, and not those in
            a `from_pretrained` of the file's own, which count where it is called.
        paths: name -> the dotted path that it was imported as.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.paths = imported_paths(walk(tree))
        self.calls: list[tuple[ast.Call, _Scope]] = []
        self._assigned = _Assigned()
        self._built = [list(_returned(node)) for node in tree.body if _is_named(node, "get_init_inputs")]
        for node in tree.body:
            self._collect(node, _Scope())
        self.calls.sort(key=lambda found: (found[0].lineno, found[0].col_offset))

    def text(self, node: ast.expr, scope: _Scope, depth: int = 0) -> str | None:
        """The string that an expression stands for, or None when the code does not say it plainly."""
        if depth > _DEPTH:
            return None
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined([node.left, node.right], scope, depth)
        if isinstance(node, ast.JoinedStr):
            values = [part.value if isinstance(part, ast.FormattedValue) else part for part in node.values]
            return self._joined(values, scope, depth)
        if isinstance(node, ast.Attribute):
            return self._first(self._assigned.attribute.get(node.attr, []), depth)
        return self._first(self._values(node.id, scope), depth) if isinstance(node, ast.Name) else None

    def _joined(self, nodes: list[ast.expr], scope: _Scope, depth: int) -> str | None:
        texts = [self.text(node, scope, depth + 1) for node in nodes]
        return None if None in texts else "".join(text for text in texts if text is not None)

    def _first(self, values: list[_Value], depth: int) -> str | None:
        found = (self.text(value, scope, depth + 1) for value, scope in values)
        return next((text for text in found if text is not None), None)

    def _values(self, name: str, scope: _Scope) -> list[_Value]:
        """What a name may stand for in its scope, the nearest first."""
        if scope.function is None:
            return self._assigned.top.get(name, [])
        local = self._assigned.local.get((id(scope.function), name), [])
        return [*local, *self._arguments(name, scope), *self._assigned.top.get(name, [])]

    def _arguments(self, name: str, scope: _Scope) -> Iterator[_Value]:
        """What a parameter is given: by whoever calls the function or builds the class, by `get_init_inputs`, by
        default.
        """
        if not isinstance(scope.function, ast.FunctionDef):
            return
        given = scope.function.args
        names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
        own = scope.inside is not None and names[:1] == ["self"]
        is_init = own and scope.function.name == "__init__"
        called = scope.inside.name if is_init and scope.inside else scope.function.name
        place = names.index(name) - own if name in names else -1
        for call, where in self.calls:
            if last_name(call.func) == called:
                yield from ((keyword.value, where) for keyword in call.keywords if keyword.arg == name)
                if 0 <= place < len(call.args):
                    yield call.args[place], where
        if is_init:
            yield from self._init_inputs(name, place)
        defaults = dict(zip(reversed(names), reversed(given.defaults), strict=False))
        defaults |= {a.arg: d for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True) if d is not None}
        if name in defaults:
            yield defaults[name], _Scope()

    def _init_inputs(self, name: str, place: int) -> Iterator[_Value]:
        """From `return [a, b]`, or from `return [[a, b], {"name": c}]`."""
        for returned in self._built:
            for node, scope in returned:
                items = node.elts if isinstance(node, ast.List | ast.Tuple) else []
                if len(items) == 2 and isinstance(items[0], ast.List) and isinstance(items[1], ast.Dict):
                    pairs = zip(items[1].keys, items[1].values, strict=True)
                    yield from ((v, scope) for k, v in pairs if isinstance(k, ast.Constant) and k.value == name)
                    items = items[0].elts
                if 0 <= place < len(items):
                    yield items[place], scope

    def _collect(self, node: ast.AST, scope: _Scope) -> None:
        if _is_script_part(node) or (isinstance(node, ast.FunctionDef) and node.name == _FROM_HUB):
            return
        if isinstance(node, ast.Call):
            self.calls.append((node, scope))
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assigned.add(target, node.value, scope)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assigned.add(node.target, node.value, scope)
        elif isinstance(node, ast.ClassDef):
            scope = _Scope(None, node)
        elif isinstance(node, _Function):
            scope = _Scope(node, scope.inside)
        for child in children(node):
            self._collect(child, scope)


def _returned(function: ast.AST) -> Iterator[_Value]:
    if isinstance(function, ast.FunctionDef):
        for node in walk(function):
            if isinstance(node, ast.Return) and node.value is not None:
                yield node.value, _Scope(function)


def _is_named(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == name


def _is_script_part(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and any(isinstance(n, ast.Name) and n.id == "__name__" for n in walk(node.test))
