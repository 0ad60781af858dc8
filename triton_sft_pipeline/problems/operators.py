"""Heavy PyTorch operators: which they are, and where code calls them. Executes nothing, and judges nothing.

Names are followed through imports and plain renaming (`F = torch.nn.functional`), modules from the name they were
assigned to (`self.conv = nn.Conv2d(...)`) to their calls.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CONTRACTION, _PASS = 2, 1

_FAMILIES: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    # family: (weight, functions and methods, classes of torch.nn). A contraction's arithmetic outweighs every pass over
    # the data around it; what takes several passes outweighs what takes one, which is in no table: element-wise
    # operators, allocation, moving data and plain sums are what a wrapper may do beside its kernel.
    "matrix product": (
        CONTRACTION,
        _words(
            """
            matmul mm bmm mv addmm addbmm addmv baddbmm einsum tensordot inner linear bilinear multi_dot chain_matmul
            cdist scaled_mm
            """
        ),
        _words("Linear LazyLinear Bilinear"),
    ),
    "convolution": (
        CONTRACTION,
        _words("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution conv_tbc"),
        _words(
            """
            Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d LazyConv1d LazyConv2d LazyConv3d
            LazyConvTranspose1d LazyConvTranspose2d LazyConvTranspose3d
            """
        ),
    ),
    "attention": (
        CONTRACTION,
        _words("scaled_dot_product_attention multi_head_attention_forward"),
        _words(
            """
            MultiheadAttention Transformer TransformerEncoder TransformerDecoder TransformerEncoderLayer
            TransformerDecoderLayer
            """
        ),
    ),
    "recurrent network": (CONTRACTION, _words("lstm gru rnn_tanh rnn_relu"), _words("LSTM GRU RNN LSTMCell GRUCell")),
    "pooling": (
        _PASS,
        _words(
            """
            max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d adaptive_max_pool1d
            adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
            """
        ),
        _words(
            """
            MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d AdaptiveMaxPool1d
            AdaptiveMaxPool2d AdaptiveMaxPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
            """
        ),
    ),
    "normalisation": (
        _PASS,
        _words("layer_norm batch_norm group_norm instance_norm rms_norm local_response_norm"),
        _words(
            """
            LayerNorm BatchNorm1d BatchNorm2d BatchNorm3d GroupNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d RMSNorm
            LocalResponseNorm
            """
        ),
    ),
    "softmax": (
        _PASS,
        _words("softmax log_softmax softmin logsumexp gumbel_softmax"),
        _words("Softmax LogSoftmax Softmin Softmax2d"),
    ),
    "interpolation": (
        _PASS,
        _words("interpolate upsample upsample_nearest upsample_bilinear grid_sample"),
        _words("Upsample UpsamplingNearest2d UpsamplingBilinear2d"),
    ),
    "loss": (
        _PASS,
        _words(
            """
            cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy
            binary_cross_entropy_with_logits triplet_margin_loss cosine_embedding_loss margin_ranking_loss
            hinge_embedding_loss poisson_nll_loss gaussian_nll_loss cosine_similarity
            """
        ),
        _words(
            """
            CrossEntropyLoss NLLLoss MSELoss L1Loss SmoothL1Loss HuberLoss KLDivLoss BCELoss BCEWithLogitsLoss
            TripletMarginLoss CosineEmbeddingLoss MarginRankingLoss HingeEmbeddingLoss PoissonNLLLoss GaussianNLLLoss
            CosineSimilarity
            """
        ),
    ),
    "scan or sort": (
        _PASS,
        _words("cumsum cumprod cummax cummin logcumsumexp sort argsort topk kthvalue"),
        (),
    ),
}
WEIGHT = {family: weight for family, (weight, _, _) in _FAMILIES.items()}
_FUNCTIONS = {name: family for family, (_, names, _) in _FAMILIES.items() for name in names}
_CLASSES = {name: family for family, (_, _, names) in _FAMILIES.items() for name in names}


@dataclass(frozen=True)
class Work:
    """Calls of heavy PyTorch operators.

    Attributes:
        calls: family -> number of calls in the source.
        names: family -> the first operator that was called, as it was written.
    """

    calls: Counter[str] = field(default_factory=Counter)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, family: str, name: str, count: int = 1) -> None:
        self.calls[family] += count
        self.names.setdefault(family, name)


def work_of(nodes: Iterable[ast.AST], paths: dict[str, str], built_counts: bool = False) -> Work:
    """Heavy operators among these nodes: functions, methods, `@`, and calls of modules that were built among them.

    Args:
        built_counts: a module that is built and called under no name that is known (in a list, say) counts once.
    """
    nodes = list(nodes)
    found = Work()
    built = _built_modules(nodes, paths)
    called: set[int] = set()

    def add_module(call: ast.Call) -> None:
        if (family := _built_family(call, paths)) is not None:
            found.add(family, path_of(call.func, paths))

    for node in nodes:
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            found.add("matrix product", "@")
        if not isinstance(node, ast.Call):
            continue
        name = last_name(node.func)
        if (family := _called_family(node.func, paths)) is not None:
            found.add(family, path_of(node.func, paths) if _is_torch(node.func, paths) else f".{name}")
        for call in [node.func] if isinstance(node.func, ast.Call) else built.get(name, []):
            called.add(id(call))
            add_module(call)
    for node in nodes if built_counts else []:
        if isinstance(node, ast.Call) and id(node) not in called:
            add_module(node)
    return found


def _built_modules(nodes: list[ast.AST], paths: dict[str, str]) -> dict[str, list[ast.Call]]:
    """name -> the calls that build heavy modules in what was assigned to it (`self.net = nn.Sequential(...)`)."""
    built: dict[str, list[ast.Call]] = {}
    for node in nodes:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            for part, value in _pairs(target, node.value):
                calls = [c for c in walk(value) if isinstance(c, ast.Call) and _built_family(c, paths)]
                for name in target_names(part) if calls else ():
                    built.setdefault(name, []).extend(calls)
    return built


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """`a, b = x, y` as [(a, x), (b, y)]."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def _built_family(node: ast.Call, paths: dict[str, str]) -> str | None:
    """The family of the module that `nn.Linear(...)` builds."""
    return layer_family(path_of(node.func, paths))


def layer_family(path: str) -> str | None:
    """The family of a layer by its dotted path ("torch.nn.Linear"); None for what is no heavy layer."""
    return _CLASSES.get(path.rpartition(".")[2]) if path.startswith("torch.nn.") else None


def _called_family(function: ast.expr, paths: dict[str, str]) -> str | None:
    """The family of an operator that is called as a function of PyTorch's or as a tensor's method."""
    if _is_torch(function, paths):
        return _FUNCTIONS.get(path_of(function, paths).rpartition(".")[2].removesuffix("_"))
    if not isinstance(function, ast.Attribute) or _is_imported(function, paths) or last_name(function.value) == "self":
        # `self.softmax(x)` may be anything.
        return None
    return _FUNCTIONS.get(function.attr.removesuffix("_"))


def _is_torch(function: ast.expr, paths: dict[str, str]) -> bool:
    return path_of(function, paths).startswith("torch.")


def _is_imported(function: ast.expr, paths: dict[str, str]) -> bool:
    while isinstance(function, ast.Attribute):
        function = function.value
    return isinstance(function, ast.Name) and function.id in paths


def walk(*roots: ast.AST) -> Iterator[ast.AST]:
    """These nodes and all below them, as `ast.walk` in no order and faster: every trace comes by here."""
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(children(node))


def children(node: ast.AST) -> list[ast.AST]:
    """The nodes right below, without Load and Store, which nobody asks for."""
    found: list[ast.AST] = []
    # Half of all nodes have nothing below.
    if not isinstance(node, ast.Name | ast.Constant):
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(value, list):
                found += [item for item in value if isinstance(item, ast.AST)]
            elif isinstance(value, ast.AST) and name != "ctx":
                found.append(value)
    return found


def imported_paths(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """name -> the dotted path that it was imported as, or that it renames (`F = torch.nn.functional`).

    Args:
        nodes: all of a module's, its top level among them.
    """
    paths: dict[str, str] = {}
    renamings: list[ast.Assign] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                paths[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and not node.level:
            paths.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            renamings.append(node)
    for node in renamings:
        path = path_of(node.value, paths)
        if path.startswith(("torch.nn", "torch.linalg", "torch.special", "triton.")):
            paths.update({target.id: path for target in node.targets if isinstance(target, ast.Name)})
    return paths


def path_of(node: ast.AST, paths: dict[str, str]) -> str:
    """`nn.functional.relu` as "torch.nn.functional.relu"; "" for what is no dotted name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([paths.get(node.id, node.id), *reversed(parts)])


def last_name(node: ast.AST) -> str:
    """The name, or the attribute's; "" for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def target_names(target: ast.expr) -> Iterator[str]:
    """The names and attributes that an assignment binds."""
    for node in walk(target):
        if isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)):
            yield last_name(node)
