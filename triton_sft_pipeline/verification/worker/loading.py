"""Loads source files as modules and puts what goes wrong in one sentence. Used in child processes only."""

from __future__ import annotations

import errno
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from triton_sft_pipeline.verification.verdict import Finding
from triton_sft_pipeline.verification.worker.interpreter import is_unsupported
from triton_sft_pipeline.verification.worker.tensors import UnsupportedValueError

_MAX_DETAIL = 600
_QUOTED = re.compile(r"at \d+:\d+:")


def load_code(file: Path, name: str) -> ModuleType:
    """Execute a source file as the module `name`. It must stay on disk: Triton reads the text of its kernels again."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def explain(error: BaseException, file: Path) -> str:
    """The error in one sentence, with the line of `file` that it came from."""
    root = _root_of(error)
    lines = [frame.lineno for frame in traceback.extract_tb(root.__traceback__) if frame.filename == str(file)]
    place = f"line {lines[-1]} of {file.name}: " if lines else ""
    message = " ".join(_message_of(root).split())[:_MAX_DETAIL]
    return f"{place}{type(root).__name__}: {message}".rstrip(": .") + "."


def classify(error: BaseException, file: Path) -> Finding:
    """The verdict for an exception that escaped from kernel code."""
    detail = explain(error, file)
    if isinstance(error, SystemExit):
        return Finding("early_exit", f"The kernel code ended its process: {detail}")
    if isinstance(error, ImportError):
        return Finding("import_error", detail)
    if is_unsupported(_root_of(error)):
        return Finding("unsupported_on_cpu", detail)
    if isinstance(error, UnsupportedValueError):
        return Finding("lazy_output", f"The kernel returns {error}; return plain tensors.")
    if is_out_of_memory(error):
        return Finding("resource_limit", f"Out of memory: {detail}")
    if isinstance(error, OSError) and error.errno in (errno.EFBIG, errno.EMFILE):
        return Finding("resource_limit", f"Too large or too many files: {detail}")
    if _is_from_triton(error, file):
        return Finding("compile_error", detail)
    return Finding("runtime_error", detail)


def _message_of(error: BaseException) -> str:
    """What an error says. Triton's compiler quotes the kernel down to the line that it refuses, with a mark below it; a
    sentence needs no more than that line."""
    lines = str(error).split("\n")
    marks = [number for number, line in enumerate(lines) if line.strip() == "^"]
    if not _QUOTED.fullmatch(lines[0]) or not marks or marks[-1] < 2:
        return str(error)
    refused, reason = lines[marks[-1] - 1].strip(), " ".join(lines[marks[-1] + 1 :]).strip()
    return f"`{refused}`: {reason}" if reason else f"`{refused}`"


def _root_of(error: BaseException) -> BaseException:
    # Triton's interpreter wraps what went wrong inside a kernel; its cause is what a person can act on.
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_from_triton(error: BaseException, file: Path) -> bool:
    """Whether Triton raised this about a kernel, and not the code around the kernels or the GPU."""
    import triton

    # A compiled kernel cannot raise, so an exception from inside one, which the interpreter wraps, is one that the
    # compiler would raise.
    if isinstance(error, triton.TritonError):
        return True
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    last_own = max((index for index, frame in enumerate(frames) if frame == file), default=-1)
    # Some refusals reach the caller unwrapped; what the launched kernel did to the GPU is a RuntimeError.
    raised_by_triton = any(Path(triton.__file__).parent in frame.parents for frame in frames[last_own + 1 :])
    return raised_by_triton and not isinstance(error, RuntimeError | OSError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this exception says that the host or the GPU has no memory left."""
    import torch

    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
