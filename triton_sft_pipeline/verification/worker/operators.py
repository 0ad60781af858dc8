"""Logs the PyTorch operators that run in a block of code and weighs what they do; can poison uninitialised memory.

Each operator is one of three kinds. Free: views, allocation, what looks at one element. Copy: data is moved, converted
or filled and stays what it was. Compute: arithmetic, which counts even on weights alone. Contractions, convolutions and
attention are weighed by the formulas of `torch.utils.flop_counter`; everything else by the elements it reads or writes,
times the number of simple passes that it takes to write it by hand. Work is a rough measure, good for shares only.

Used in the kernel's process and on the reference, so that both are weighed alike. Knows nothing of what is fair; see
`policy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from triton_sft_pipeline.verification.worker.interpreter import settle
from triton_sft_pipeline.verification.worker.launches import LaunchMonitor
from triton_sft_pipeline.verification.worker.poison import poison, poison_growth

FREE, COPY, COMPUTE = "free", "copy", "compute"
_NESTED = "nested"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ALLOCATIONS = _words("empty empty_like empty_strided empty_permuted new_empty new_empty_strided")
_RESIZES = _words("resize_ resize_as_ _resize_output_")
_LOOKS = _words("""
    _unsafe_view _reshape_alias lift set_ record_stream is_pinned _fused_sdp_choice _local_scalar_dense sym_size
    sym_stride sym_numel sym_storage_offset is_same_size _efficientzerotensor _assert_async _assert_tensor_metadata
    detach_ t_ transpose_ squeeze_ unsqueeze_ as_strided_ swapaxes_ swapdims_ _cudnn_init_dropout_state
""")
# One element goes to the host, where plain Python may compute on it.
_READ = "_local_scalar_dense"
_MOVES = _words("""
    clone contiguous copy copy_ _to_copy to cat stack index index_select gather take embedding constant_pad_nd flip
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d roll
    rot90 repeat repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle im2col masked_select index_copy
    index_copy_ index_put index_put_ _index_put_impl_ _unsafe_index _unsafe_index_put select_scatter slice_scatter
    diagonal_scatter as_strided_scatter scatter scatter_ masked_scatter masked_scatter_ diag_embed _pin_memory
    _reshape_copy _foreach_copy_ unfold_copy view_copy expand_copy permute_copy transpose_copy t_copy squeeze_copy
    unsqueeze_copy select_copy slice_copy split_copy split_with_sizes_copy unbind_copy narrow_copy as_strided_copy
    alias_copy diagonal_copy view_as_real_copy view_as_complex_copy max_unpool2d max_unpool3d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d
""")
# These return the whole tensor and write to a part of it.
_PARTIAL = ("index_put", "index_copy", "_index_put", "_unsafe_index_put", "scatter", "masked_scatter")
_FILLS = _words("""
    zeros zeros_like zero_ zero ones ones_like full full_like fill fill_ new_zeros new_ones new_full arange linspace
    logspace eye scalar_tensor tril_indices triu_indices _foreach_zero_
""")
# Fills write without reading, and are how a wrapper gets an accumulator ready.
_FILL_FACTOR = 0.1

# Simple passes over the elements that these take when they are written by hand; others take one.
_PASSES = {
    2: """silu hardsigmoid elu celu selu leaky_relu _prelu_kernel addcmul addcdiv native_dropout linalg_vector_norm norm
          dot vdot cumprod logcumsumexp""",
    3: """gelu softplus hardswish mish log_sigmoid_forward glu lerp std var std_mean var_mean dist mse_loss softshrink
          soft_margin_loss renorm erfinv""",
    4: """_native_batch_norm_legit_no_training logsumexp smooth_l1_loss huber_loss _fused_rms_norm topk kthvalue median
          _weight_norm_interface multi_margin_loss multilabel_margin_loss_forward""",
    5: """_softmax _log_softmax softmax log_softmax _safe_softmax _masked_softmax binary_cross_entropy
          binary_cross_entropy_with_logits _thnn_fused_lstm_cell _thnn_fused_gru_cell""",
    6: """native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm
          miopen_batch_norm _batch_norm_with_update _batch_norm_no_update layer_norm group_norm batch_norm""",
    8: "upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa grid_sampler_2d",
    10: "sort argsort _fft_r2c _fft_c2r _fft_c2c upsample_trilinear3d grid_sampler_3d",
    32: "upsample_bicubic2d _upsample_bicubic2d_aa",
}
_FACTORS = {name: float(passes) for passes, names in _PASSES.items() for name in _words(names)}
_WINDOWS = _words("""
    avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices
    fractional_max_pool2d fractional_max_pool3d
""")

Formula = Callable[[Sequence[Any], dict[str, Any], Any], float]


class _Rule(NamedTuple):
    name: str
    kind: str
    weigh: Formula
    base: str


class OperatorLog:
    """A context manager; logs this thread's operators while it is entered, and adds up over several uses.

    Args:
        monitor: says which operators are Triton's own, not the wrapper's; None when there are no launches.
        poison: fill memory that PyTorch leaves uninitialised with NaN, or with the greatest value of its type.

    Attributes:
        before_compute: called before the first copy or compute operator, then forgotten.
        compute: operations so far.
        copy: elements moved so far.
        scalars: operations on single elements, which are not in `compute`, and elements read into plain Python.
        intact: false when the log was taken off while it was entered.
    """

    def __init__(self, monitor: LaunchMonitor | None = None, poison: bool = False) -> None:
        self.before_compute: Callable[[], None] | None = None
        self.compute = 0.0
        self.copy = 0.0
        self.scalars = 0
        self.intact = True
        self._monitor = monitor
        self._poison = poison
        self._settles = monitor is not None and monitor.backend == "interpreter"
        self._totals: dict[tuple[str, str], float] = {}
        self._rules: dict[Any, _Rule] = {}
        self._flops = _flop_formulas()
        self._mode = _dispatch_mode(self._run)

    def __enter__(self) -> OperatorLog:
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode

        while (top := _get_current_dispatch_mode()) is not self._mode:
            self.intact = False
            if top is None:
                return
            # What the code left on the log must not watch what comes after it.
            _pop_mode()
        self._mode.__exit__(*exception)

    def top(self, count: int) -> list[tuple[str, float]]:
        """The operators that computed most, with their work; those that copied most when nothing was computed."""
        kind = COMPUTE if self.compute > 0 else COPY
        found = [(name, work) for (name, found_kind), work in self._totals.items() if found_kind == kind]
        return sorted(found, key=lambda item: -item[1])[:count]

    def _run(self, operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self._monitor is not None and self._monitor.inside:
            return operator(*args, **kwargs)
        if self._settles:
            # In the interpreter an operator on a side stream runs at once, so what it may depend on must run before.
            settle()
        rule = self._rules.get(operator)
        if rule is None:
            rule = self._rules[operator] = self._rule(operator)
        self.scalars += rule.base == _READ
        if rule.kind == FREE:
            return self._allocate(rule, operator, args, kwargs) if self._poison else operator(*args, **kwargs)
        if rule.kind == _NESTED:
            return self._open(rule, operator, args, kwargs)
        self._announce()
        result = operator(*args, **kwargs)
        self._add(rule, args, kwargs, result)
        return result

    def _announce(self) -> None:
        if self.before_compute is not None:
            before, self.before_compute = self.before_compute, None
            before()

    def _add(self, rule: _Rule, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        if max(_elements(args), _elements(kwargs), _elements(result)) <= 1:
            self.scalars += rule.kind == COMPUTE
            return
        kind = rule.kind
        if kind == COPY and (_leaves_gpu(args, result) or _accumulates(rule.base, args, kwargs)):
            # What is taken to the host is taken there to be computed on, where nothing is logged.
            kind = COMPUTE
        work = rule.weigh(args, kwargs, result)
        self._totals[rule.name, kind] = self._totals.get((rule.name, kind), 0.0) + work
        self.compute += work if kind == COMPUTE else 0.0
        self.copy += work if kind == COPY else 0.0

    def _open(self, rule: _Rule, operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator that is made of others, or whose code is the kernel's own, with the log looking inside."""
        seen, inside = self._seen(), _inner(operator, args)
        if inside is None:
            result = operator(*args, **kwargs)
        else:
            with self._mode:
                result = inside(*args, **kwargs)
        if operator.namespace != "aten" and self._seen() == seen:
            # Machine code that calls no operators.
            self._add(rule._replace(kind=COMPUTE), args, kwargs, result)
        return result

    def _seen(self) -> tuple[float, float, int]:
        return self.compute, self.copy, 0 if self._monitor is None else self._monitor.count

    def _allocate(self, rule: _Rule, operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._announce()
        grown_from = args[0].untyped_storage().nbytes() if rule.base in _RESIZES else None
        result = operator(*args, **kwargs)
        if rule.base in _ALLOCATIONS:
            poison(result)
        elif grown_from is not None:
            poison_growth(result, grown_from)
        return result

    def _rule(self, operator: Any) -> _Rule:
        import torch

        if not isinstance(operator, torch._ops.OpOverload):
            return _Rule(str(operator), COMPUTE, _by_elements(1.0), str(operator))
        base = operator._schema.name.partition("::")[2]
        name = f"{operator.namespace}.{base}"
        if operator.namespace not in ("aten", "prim", "prims"):
            return _Rule(name, _NESTED, _by_elements(1.0), base)
        if operator.is_view or base in _ALLOCATIONS | _RESIZES | _LOOKS or operator.namespace == "prim":
            return _Rule(name, FREE, _by_elements(0.0), base)
        formula = self._flops.get(operator._overloadpacket) or _special_formula(base)
        if formula is None and base not in _MOVES | _FILLS and _is_composite(operator):
            return _Rule(name, _NESTED, _by_elements(1.0), base)
        if base in _MOVES:
            return _Rule(name, COPY, _by_values if base.startswith(_PARTIAL) else _by_result, base)
        if base in _FILLS:
            return _Rule(name, COPY, _by_elements(_FILL_FACTOR), base)
        return _Rule(name, COMPUTE, formula or _by_elements(_factor(base)), base)


def _dispatch_mode(run: Callable[[Any, Sequence[Any], dict[str, Any]], Any]) -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return run(func, args, kwargs or {})

    return Mode()


def _is_composite(operator: Any) -> bool:
    """Whether it only calls others. Such operators are seen under torch.inference_mode alone."""
    import torch

    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key))


def _inner(operator: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
    """The operator's own code, past the log that would catch the operator itself again; None when there is no way."""
    import torch

    if operator.namespace == "aten":
        inside: Callable[..., Any] = operator.decompose
        return inside
    key = "CUDA" if any(tensor.device.type == "cuda" for tensor in _tensors(args)) else "CPU"
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator.name(), key):
        return None
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return lambda *args, **kwargs: operator.redispatch(keys, *args, **kwargs)


def _tensors(value: Any) -> Iterator[Any]:
    """The tensors among arguments, at any depth of lists, tuples and dictionaries."""
    if hasattr(value, "untyped_storage"):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _elements(value: Any) -> int:
    """Elements of the largest argument; a list of tensors is one argument."""
    if hasattr(value, "untyped_storage"):
        return int(value.numel())
    if isinstance(value, dict):
        return max((_elements(item) for item in value.values()), default=0)
    if isinstance(value, tuple):
        return max((_elements(item) for item in value), default=0)
    return sum(_elements(item) for item in value) if isinstance(value, list) else 0


def _leaves_gpu(args: Sequence[Any], result: Any) -> bool:
    places = {tensor.device.type for tensor in _tensors(args)} if _elements(args) else set()
    return "cuda" in places and any(tensor.device.type == "cpu" for tensor in _tensors(result))


def _by_elements(factor: float) -> Formula:
    return lambda args, kwargs, result: factor * max(_elements(args), _elements(kwargs), _elements(result))


def _by_result(args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    # Not the inputs: picking ten rows of a large table moves ten rows. Some that work in place return nothing.
    return float(_elements(result) or _elements(args[:1]))


def _by_values(args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    return float(max(_elements(args[1:]), 1))


def _accumulates(base: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return "index_put" in base and bool(kwargs.get("accumulate", len(args) > 3 and args[3]))


def _factor(base: str) -> float:
    name = base.removeprefix("_foreach_").removesuffix("_")
    return _FACTORS.get(base) or _FACTORS.get(name) or (3.0 if "_loss" in name else 1.0)


def _shape(value: Any) -> Any:
    return getattr(value, "shape", value)


def _flop_formulas() -> dict[Any, Formula]:
    from torch.utils.flop_counter import flop_registry

    def formula(count: Callable[..., float]) -> Formula:
        # What is registered looks for tensors at any depth, which takes longer than the product of small matrices.
        by_shape = getattr(count, "__wrapped__", None)

        def weigh(args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
            try:
                if by_shape is None:
                    return float(count(*args, **kwargs, out_val=result))
                return float(by_shape(*map(_shape, args), out_shape=_shape(result)))
            # The formulas are strict about shapes that the operators themselves accept.
            except Exception:
                return _by_elements(2.0)(args, kwargs, result)

        return weigh

    return {operator: formula(count) for operator, count in flop_registry.items()}


def _special_formula(base: str) -> Formula | None:
    name = base.removesuffix("_")
    if base in _WINDOWS:
        return _pooling
    if base in ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn"):
        return _recurrent
    if base in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        return _encoder
    if name in ("mv", "addmv", "ger", "addr"):
        return _by_elements(2.0)
    if name == "addbmm":
        return lambda args, kwargs, result: 2.0 * args[1].numel() * args[2].shape[-1]
    if name in ("linear", "mkldnn_linear"):
        return lambda args, kwargs, result: 2.0 * args[0].numel() * args[1].shape[0]
    if name in ("_cdist_forward", "_euclidean_dist"):
        return lambda args, kwargs, result: 3.0 * result.numel() * args[0].shape[-1]
    if name == "_trilinear":
        return lambda args, kwargs, result: 2.0 * args[0].numel() * max(1, args[1].numel()) / max(1, args[0].shape[0])
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return lambda args, kwargs, result: 4.0 * args[0].numel() * args[1].shape[-2]
    if name == "_embedding_bag":
        return lambda args, kwargs, result: float(args[1].numel() * args[0].shape[-1])
    if name.startswith(("linalg_", "_linalg_", "cholesky", "triangular_solve")) and "norm" not in name:
        return lambda args, kwargs, result: float(_elements(args) * max(1, args[0].shape[-1]))
    return None


def _pooling(args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    output = next(_tensors(result))
    window = args[1] if isinstance(args[1], list | tuple) else [args[1]]
    dimensions = int(args[0].dim()) - 2
    size = math.prod(window) if len(window) > 1 else int(window[0]) ** max(1, dimensions)
    return float(max(output.numel() * size, args[0].numel()))


def _recurrent(args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    steps = args[0].numel() / max(1, args[0].shape[-1])
    return 2.0 * steps * sum(tensor.numel() for tensor in _tensors(args[1:]) if tensor.dim() == 2)


def _encoder(args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> float:
    tokens = args[0].numel() / max(1, args[0].shape[-1])
    weights = sum(tensor.numel() for tensor in _tensors(args[3:]) if tensor.dim() == 2)
    length = args[0].shape[-2] if args[0].dim() > 1 else 1
    return 2.0 * tokens * weights + 4.0 * args[0].numel() * length
