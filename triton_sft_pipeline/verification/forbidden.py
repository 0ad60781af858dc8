"""What kernel code may name: modules, functions, builtins and attributes, as tables. Knows nothing of syntax trees.

A path is a dotted name as it would be imported, such as "torch.nn.functional.relu"; builtins stand under "builtins.".
The longest entry that matches a path decides. An entry matches itself and everything below it, and one that ends in a
dot matches only what is below. So "os" may be imported, "os." is refused, and "os.cpu_count" is fine again.

Modules are an allow-list: what is in no table is refused if it is part of Python or installed. What is not installed is
left to the run, which calls it an import_error. Below a module that is allowed the tables are a deny-list plus one
rule: private names are refused. A name that does not exist there is an honest mistake, which the run finds too.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True)
class Rule:
    """A reason to refuse: the verdict, what to do instead, and the entries it is for."""

    verdict: str
    advice: str
    entries: tuple[str, ...] = ()


# Pure helpers: they can do nothing that plain Python cannot.
_HELPERS = _words(
    """
    __future__ abc argparse bisect cmath collections contextlib copy dataclasses datetime decimal enum fractions
    functools heapq itertools logging math numbers operator pprint random re statistics string textwrap time
    typing typing_extensions warnings
    """
)
# Small harmless parts of modules that are refused otherwise.
_PARTS = _words(
    """
    gc gc.collect io io.StringIO os os.cpu_count traceback traceback.print_exc traceback.format_exc types
    types.SimpleNamespace sys sys.argv sys.byteorder sys.float_info sys.maxsize sys.platform
    sys.setrecursionlimit sys.stderr sys.stdout sys.version sys.version_info
    """
)
# NumPy may do the arithmetic of sizes and scales, not that of tensors.
_NUMPY = _words(
    """
    numpy numpy.bool_ numpy.ceil numpy.dtype numpy.e numpy.finfo numpy.float16 numpy.float32 numpy.float64
    numpy.floor numpy.floating numpy.iinfo numpy.inf numpy.int16 numpy.int32 numpy.int64 numpy.int8 numpy.integer
    numpy.log numpy.log2 numpy.nan numpy.ndarray numpy.pi numpy.prod numpy.sqrt numpy.uint8
    """
)
# All of PyTorch but what the rules below name.
_TORCH = _words(
    """
    torch torch._assert torch._check torch._dynamo.disable torch.compiler.disable torch.compiler.is_compiling
    torch.jit.Final torch.jit.ignore torch.jit.is_scripting torch.jit.is_tracing torch.jit.unused
    torch.nn.modules.module.Module torch.nn.modules torch.ops.aten torch.signal torch.types torch.utils.benchmark
    torch.utils.checkpoint
    """
)
# All of Triton but what the rules below name.
_TRITON = _words(
    """
    triton triton.compiler.CompilationError triton.compiler.errors triton.experimental.gluon triton.language
    triton.runtime triton.runtime.OutOfResources triton.runtime.autotuner.OutOfResources triton.runtime.errors
    triton.runtime.driver triton.runtime.driver.active triton.runtime.driver.active.utils
    triton.runtime.driver.active.get_active_torch_device triton.runtime.driver.active.get_current_device
    triton.runtime.driver.active.get_current_stream triton.runtime.driver.active.get_current_target
    triton.runtime.driver.active.utils.get_device_properties triton.tools.tensor_descriptor
    """
)
_ALLOWED = frozenset((*_HELPERS, *_PARTS, *_NUMPY, *_TORCH, *_TRITON))

# Where a name below torch or triton may be private: kernels use tl._experimental_..., layers use _pair and _ConvNd.
_PRIVATE_IS_FINE = frozenset(("triton.language", "triton.experimental.gluon", "torch.nn.modules", "torch.ops.aten"))

_REFUSED = (
    Rule(
        "sandbox_violation",
        "a kernel works on its arguments alone: leave out files, processes, the network, native libraries and "
        "the environment",
        _words(
            """
            builtins.open os. io. argparse.FileType logging.FileHandler logging.handlers logging.config pathlib shutil
            glob fileinput tempfile mmap fcntl resource posix pty pickle marshal shelve dbm sqlite3 zipfile tarfile
            subprocess socket socketserver ssl select selectors urllib http ftplib smtplib ctypes cffi sys.path
            sys.stdin sys.addaudithook torch.load torch.save torch.from_file torch.hub torch.package
            torch.serialization torch.distributed torch.onnx torch.export torch.ops.load_library torch.classes
            torch.utils.cpp_extension torch.utils.model_zoo torch.cuda.cudart numpy.ctypeslib
            """
        ),
    ),
    Rule(
        "early_exit",
        "a kernel ends by returning its outputs, never the process; raise an exception for arguments it cannot take",
        _words(
            """
            builtins.exit builtins.quit builtins.SystemExit builtins.KeyboardInterrupt builtins.GeneratorExit sys.exit
            os._exit os.abort os.kill os.killpg
            """
        ),
    ),
    Rule(
        "reference_access",
        "a kernel has no business in frames, other objects' insides or the judge's modules; use its arguments",
        _words(
            """
            builtins.globals builtins.locals builtins.breakpoint builtins.__builtins__ builtins.__spec__
            builtins.__loader__ builtins.memoryview builtins.help gc. traceback. inspect linecache __main__
            operator.attrgetter operator.methodcaller string.Formatter sys._getframe sys._current_frames sys.exc_info
            sys.last_traceback triton_sft_pipeline
            """
        ),
    ),
    Rule(
        "harness_tamper",
        "leave Python, PyTorch and Triton as they are and use their public interfaces; launch kernels with "
        "kernel[grid](...)",
        _words(
            """
            builtins builtins.vars sys. sys.modules os.putenv os.unsetenv
            os.environ.setdefault os.environ.update os.environ.pop
            os.environ.clear os.environ.__setitem__ atexit trace tracemalloc profile cProfile pdb bdb unittest
            torch.library torch.overrides torch.utils._python_dispatch torch.nn.modules.module
            torch.cuda.memory.change_current_allocator torch.cuda.memory.CUDAPluggableAllocator
            torch.cuda.CUDAPluggableAllocator torch.cuda.change_current_allocator torch.utils._device triton.knobs
            triton.JITFunction triton.KernelInterface triton.Autotuner triton.Heuristics triton.compiler
            triton.compile triton.backends triton.runtime. triton.runtime.driver. triton.runtime.driver.active.
            triton.runtime.driver.active.utils. triton.tools triton.profiler triton.TensorWrapper
            """
        ),
    ),
    Rule(
        "torch_fallback",
        "PyTorch's compilers write the kernel themselves; write the computation in a @triton.jit function",
        _words(
            """
            torch.compile torch.compiler torch.jit torch.fx torch._dynamo torch._inductor
            """
        ),
    ),
    Rule(
        "lazy_output",
        "return plain tensors, computed when the wrapper returns",
        _words(
            """
            torch.Tensor.as_subclass torch.Tensor._make_subclass torch.Tensor._make_wrapper_subclass torch._subclasses
            torch._tensor torch.Tensor.__torch_function__ torch.masked torch.futures
            """
        ),
    ),
    Rule(
        "forbidden_construct",
        "a Triton kernel does not need it; compute on tensors, in a @triton.jit function, in the thread that called",
        _words(
            """
            builtins.eval builtins.exec builtins.compile builtins.__import__ importlib imp runpy pkgutil zipimport
            code codeop types. typing.get_type_hints typing.ForwardRef functools.singledispatch
            functools.singledispatchmethod signal weakref threading _thread queue multiprocessing concurrent asyncio
            torch.multiprocessing numpy. torch.ops. torch.utils. torch.utils.benchmark. torch.from_numpy
            torch.from_dlpack torch.frombuffer torch.UntypedStorage torch.TypedStorage torch.storage
            torch.cuda.CUDAGraph torch.cuda.graph torch.cuda.graphs torch.cuda.make_graphed_callables
            torch.cuda.caching_allocator_alloc
            """
        ),
    ),
)

_PRIVATE = Rule("harness_tamper", "it is private; use public interfaces")
_UNLISTED = Rule("forbidden_construct", "a kernel needs torch, triton and pure helpers such as math or typing; drop it")

_RULES = {entry: rule for rule in _REFUSED for entry in rule.entries}

# Modules that others hold as attributes, such as torch.os or random._os; judged as if they had been imported.
_HIDDEN_MODULES = frozenset(
    _words(
        """
        atexit builtins ctypes functools gc importlib inspect io linecache marshal multiprocessing os pathlib pickle
        shutil socket subprocess sys tempfile threading traceback weakref
        """
    )
)

# Names between two double underscores that honest classes define and honest code reads. All others are refused.
HONEST_DUNDERS = frozenset(
    f"__{name}__"
    for name in _words(
        """
        all author class doc file name qualname version annotations slots match_args debug init post_init
        new call repr str format len iter next reversed contains getitem setitem delitem getattr enter exit missing
        hash bool int float index complex eq ne lt le gt ge add radd iadd sub rsub isub mul rmul imul matmul rmatmul
        truediv rtruediv floordiv rfloordiv mod rmod pow rpow neg pos abs invert and or xor lshift rshift round floor
        ceil
        """
    )
)

_INSIDES = Rule("reference_access", "it leads to the insides of other objects; use a kernel's arguments")
_HOST_VALUES = Rule(
    "forbidden_construct", "it hands tensor values to the host, past Triton and past the judge; compute on tensors"
)
_SUBCLASS = Rule("lazy_output", "return plain tensors, computed when the wrapper returns")
_HOOKS = Rule("forbidden_construct", "Python calls it behind the code's back; leave it out")

# Attributes that are refused on every object.
_ATTRIBUTES = {
    **dict.fromkeys(
        _words(
            """
            f_back f_locals f_globals f_code f_builtins gi_frame gi_code cr_frame ag_frame tb_frame tb_next co_code
            co_consts func_globals mro
            """
        ),
        _INSIDES,
    ),
    "__dict__": Rule(
        "harness_tamper", "name attributes one by one; a dictionary of a module's or class's can be changed"
    ),
    **dict.fromkeys(("__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__"), _HOST_VALUES),
    **dict.fromkeys(
        ("as_subclass", "_make_subclass", "_make_wrapper_subclass", "__torch_function__", "__torch_dispatch__"),
        _SUBCLASS,
    ),
    **dict.fromkeys(("__del__", "__reduce__", "__reduce_ex__", "__getattribute__", "__instancecheck__"), _HOOKS),
}
# The same, but a class may have a field of this name.
_FIELDS_OR_METHODS = dict.fromkeys(
    _words("numpy tolist storage untyped_storage share_memory_ apply_ map_ map2_"), _HOST_VALUES
)

# What the tables list below a module, by its last name alone; what a pattern reads has no other.
_LEAVES = {entry.rstrip(".").rpartition(".")[2]: rule for entry, rule in _RULES.items() if "." in entry[:-1]}

# Environment variables that libraries document for users; the child's environment holds no other of interest.
READABLE_VARIABLES = ("TRITON_", "TORCH_", "PYTORCH_", "CUDA_", "DEBUG")

# Settings which PyTorch documents as attributes to be assigned.
ASSIGNABLE = "torch.backends."
_CLOCKS = ("time.", "torch.cuda.", "triton.testing.")

# Modules that honest code only ever looks into. Passed around as values, they could be changed under another name.
MODULES = frozenset(
    _words(
        """
        torch torch.autograd torch.backends torch.cuda torch.cuda.amp torch.linalg torch.nn torch.nn.functional
        torch.nn.init torch.nn.modules torch.random torch.special torch.testing torch.utils torch.version torch.amp
        triton triton.language triton.language.core triton.language.extra triton.language.extra.cuda
        triton.language.extra.cuda.libdevice triton.language.extra.libdevice triton.language.math triton.runtime
        triton.runtime.driver triton.runtime.driver.active triton.runtime.driver.active.utils triton.testing
        """
    )
) | {entry for entry in _ALLOWED if "." not in entry}
# Classes that may be called, annotated with, derived from and compared, but not passed around: see MODULES.
CLASSES = frozenset(
    _words(
        """
        torch.Tensor torch.nn.Module torch.nn.Parameter torch.nn.parameter.Parameter torch.cuda.Event
        torch.cuda.Stream torch.autograd.Function
        """
    )
)
TENSOR_CLASSES = frozenset(
    _words(
        """
        torch.Tensor torch.nn.Parameter torch.nn.parameter.Parameter torch.nn.Buffer torch.FloatTensor
        torch.cuda.FloatTensor torch.nn.parameter.UninitializedTensorMixin torch.nn.parameter.UninitializedParameter
        torch.nn.UninitializedParameter
        """
    )
)
# What makes a kernel the one that it is; assigned on no object but `self`, as a kernel may have any name.
KERNEL_PARTS = frozenset(_words("fn run warmup src raw_src pre_hook post_hook do_bench"))
# Decorators that make a kernel of a function.
JIT = ("triton.jit", "triton.experimental.gluon.jit", "triton.runtime.jit.jit")


def refusal_of_path(path: str) -> Rule | None:
    """Why kernel code may not import or use what this dotted path names; None if it may, or if it is not installed."""
    segments = path.split(".")
    if path == "builtins" or segments[0] != "builtins":
        return _refusal_of_import(segments)
    # The module may not be imported, but each builtin that no table names is fine.
    return next((_RULES[head] for head in _candidates(segments)[1:] if head in _RULES), None)


def _refusal_of_import(segments: list[str]) -> Rule | None:
    for index, segment in enumerate(segments[1:], start=1):
        if segment.lstrip("_") in _HIDDEN_MODULES:
            return _refusal_of_import([segment.lstrip("_"), *segments[index + 1 :]]) or _PRIVATE
    entry = max((entry for entry in _candidates(segments) if entry in _RULES or entry in _ALLOWED), key=len, default="")
    if entry in _RULES:
        return _RULES[entry]
    if not entry:
        return None if is_unknown_module(segments[0]) else _UNLISTED
    below = segments[entry.count(".") + 1 :]
    return _PRIVATE if entry not in _PRIVATE_IS_FINE and any(map(_is_private, below)) else None


def refusal_of_attribute(name: str, is_own: bool = False) -> Rule | None:
    """Why no attribute or method of this name may be used; None if it may. is_own: it is one of `self`."""
    if name in _ATTRIBUTES:
        return _ATTRIBUTES[name]
    if name in _FIELDS_OR_METHODS and not is_own:
        return _FIELDS_OR_METHODS[name]
    return _INSIDES if is_dunder(name) and name not in HONEST_DUNDERS else None


def refusal_of_pattern(name: str) -> Rule | None:
    """Why no class pattern may read this attribute, of whatever object it is; None if it may."""
    listed = _LEAVES.get(name) or (_PRIVATE if name.startswith("_") or name in _HIDDEN_MODULES else None)
    return refusal_of_attribute(name) or listed


def refusal_of_definition(name: str) -> Rule | None:
    """Why no function of this name may be defined; None if it may."""
    return _ATTRIBUTES.get(name) or (_HOOKS if is_dunder(name) and name not in HONEST_DUNDERS else None)


def refusal_of_change(path: str) -> Rule | None:
    """Why nothing may be assigned to what this dotted path names; None if it may."""
    if path.startswith(ASSIGNABLE):
        return None
    verdict = "timing_tamper" if path.startswith(_CLOCKS) else "harness_tamper"
    return Rule(verdict, "it belongs to everyone in the process; keep state in objects of your own")


def is_unknown_module(path: str) -> bool:
    """Whether this names a module that is neither part of Python nor installed, which a run finds out."""
    top = path.partition(".")[0]
    return top != "__main__" and top not in sys.stdlib_module_names and not _is_installed(top)


def is_dunder(name: str) -> bool:
    """Whether a name stands between two double underscores."""
    return len(name) > 4 and name.startswith("__") and name.endswith("__")


def _candidates(segments: list[str]) -> list[str]:
    heads = [".".join(segments[:count]) for count in range(1, len(segments) + 1)]
    return heads + [f"{head}." for head in heads[:-1]]


def _is_installed(name: str) -> bool:
    # Finds the file without executing it. ValueError: a module without a spec, which is loaded all the same.
    try:
        return importlib.util.find_spec(name) is not None
    except (ValueError, ImportError, AttributeError):
        return True


def _is_private(name: str) -> bool:
    return name.startswith("_") and not is_dunder(name)
