"""Forged answers: on standard output, in files, on every open descriptor, in the judge's own format."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import CALL, DOUBLE, Case, kernel, pointwise_kernel

_WRONG_VALUES = frozenset(
    {"incorrect_numerical", "forged_result", "early_exit", "forbidden_construct", "sandbox_violation", "harness_tamper"}
)
_EXTRA = frozenset({"forged_result", "early_exit", "forbidden_construct", "sandbox_violation", "harness_tamper"})

_REPORT = """{"verdict": "verified", "correctness": true, "launches": 1, "exit_code": 0}"""
# A frame of the judge's: the length of a header, the header, no arrays.
_FRAME = f"""
import json, struct
header = json.dumps({_REPORT.replace("true", "True")}).encode()
frame = struct.pack("<Q", len(header)) + header
"""
_FRAMES_FROM_ALL = """
import os
for fd in range(3, 51):
    try:
        os.write(fd, frame)
    except OSError:
        pass
"""
_SOCKETS = """
import gc, socket
for item in gc.get_objects():
    if isinstance(item, socket.socket):
        item.setblocking(True)
        item.send(frame)
"""


def _wrong(name: str, before: str, kind: str = "forged result") -> Case:
    """Computes something else and says that all is well."""
    return Case(name, kind, DOUBLE, pointwise_kernel("x * 3", before=before), _WRONG_VALUES)


def _extra(name: str, before: str) -> Case:
    """Computes the right thing and sends more than it was asked for."""
    return Case(name, "forged result", DOUBLE, kernel(f"{before}\n{CALL}"), _EXTRA)


CASES = (
    _wrong("a forged answer on standard output", f"print({_REPORT!r}, flush=True)"),
    _wrong("a forged answer on standard error", f"import sys\nprint({_REPORT!r}, file=sys.stderr, flush=True)"),
    _wrong("a forged answer on the second descriptor", f"import os\nos.write(2, b'{_REPORT}')"),
    _wrong("a forged report beside the real one", f"import os\nos.write(3, b'{_REPORT}')"),
    _wrong("a forged report and an exit", f"import os\nos.write(3, b'{_REPORT}')\nos._exit(0)"),
    _wrong(
        "a forged report on every open descriptor",
        f"frame = b'{_REPORT}'\n" + _FRAMES_FROM_ALL.strip(),
    ),
    _wrong("a forged frame on every open descriptor", _FRAME.strip() + "\n" + _FRAMES_FROM_ALL.strip()),
    _wrong("a forged frame on every socket", _FRAME.strip() + "\n" + _SOCKETS.strip()),
    _wrong(
        "forged files of outputs",
        f"for name in ('outputs.pt', 'expected.pt', 'result.json', 'report.json'):\n"
        f"    torch.save({{'output': x * 2}}, name) if name.endswith('pt') else open(name, 'w').write('''{_REPORT}''')",
    ),
    _wrong(
        "a file of outputs that is a program",
        """
import pickle
class Program:
    def __reduce__(self):
        return print, ("verified",)
open("outputs.pt", "wb").write(pickle.dumps(Program()))
""".strip(),
    ),
    _wrong("a finite flood of output", "for line in range(2000):\n    print('verified' * 1000)", "output flood"),
    _wrong(
        "control characters on standard output",
        r"print('\x1b[2J\x00\x1b]0;verified\x07\r\n--- verified ---\r\n' * 100, flush=True)",
        "output flood",
    ),
    _extra("an extra frame on every open descriptor", _FRAME.strip() + "\n" + _FRAMES_FROM_ALL.strip()),
    _extra("an extra frame on every socket", _FRAME.strip() + "\n" + _SOCKETS.strip()),
    _extra("half a frame", _FRAME.strip() + "\nframe = frame[:12]\n" + _FRAMES_FROM_ALL.strip()),
    _extra(
        "a frame that claims to be huge",
        "import struct\nframe = struct.pack('<Q', (1 << 63) - 1)\n" + _FRAMES_FROM_ALL.strip(),
    ),
    _extra("a frame of nothing", "frame = bytes(8)\n" + _FRAMES_FROM_ALL.strip()),
    _extra(
        "a frame that is nested without end",
        "import struct\nheader = b'[' * 100000\nframe = struct.pack('<Q', len(header)) + header\n"
        + _FRAMES_FROM_ALL.strip(),
    ),
    _extra(
        "a descriptor that is closed",
        "import os\nfor fd in range(3, 51):\n    try:\n        os.close(fd)\n    except OSError:\n        pass",
    ),
)
