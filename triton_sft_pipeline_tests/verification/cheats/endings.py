"""Kernels that end their process before it answered, or that never end."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import CALL, DOUBLE, DOUBLE_KERNEL, Case, kernel, pointwise_kernel

_EXITED = frozenset({"early_exit", "forbidden_construct"})
_KILLED = frozenset({"crash", "early_exit", "forbidden_construct", "sandbox_violation"})
# The first process of a namespace survives its own signals.
_SIGNALLED = _KILLED | {"runtime_error"}
_SURVIVED = "raise RuntimeError('still alive')"
_RAISED = frozenset({"early_exit", "runtime_error", "forbidden_construct"})
_ENDLESS = frozenset({"timeout", "forbidden_construct"})


def _exiting(name: str, before: str, verdicts: frozenset[str] = _EXITED, mentions: str = "") -> Case:
    return Case(name, "exiting", DOUBLE, pointwise_kernel("x * 2", before=before), verdicts, mentions)


def _endless(name: str, before: str, prelude: str = "", verdicts: frozenset[str] = _ENDLESS) -> Case:
    return Case(name, "endless", DOUBLE, kernel(f"{before}\n{CALL}", prelude=prelude), verdicts)


EXITS = (
    _exiting("sys.exit", "import sys\nsys.exit(0)"),
    _exiting("os._exit", "import os\nos._exit(0)"),
    _exiting("SystemExit", "raise SystemExit(0)"),
    _exiting("SystemExit of another number", "raise SystemExit(3)"),
    _exiting("KeyboardInterrupt", "raise KeyboardInterrupt", _RAISED),
    _exiting("GeneratorExit", "raise GeneratorExit", _RAISED),
    _exiting("an exception of one's own above Exception", "raise type('Above', (BaseException,), {})()", _RAISED),
    _exiting("exit by name", "exit(0)", _RAISED),
    _exiting("os._exit by a name put together at run time", "getattr(__import__('o' + 's'), '_ex' + 'it')(0)"),
    _exiting("os.abort", "import os\nos.abort()", _KILLED),
    _exiting("suicide", f"import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n{_SURVIVED}", _SIGNALLED),
    _exiting("a polite suicide", f"import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n{_SURVIVED}", _SIGNALLED),
    _exiting("a segmentation fault", "import ctypes\nctypes.string_at(0)", _KILLED),
    _exiting("another program in its place", "import os\nos.execv('/bin/true', ['true'])", _SIGNALLED),
    Case("sys.exit at import", "exiting", DOUBLE, "import sys\n" + DOUBLE_KERNEL + "\nsys.exit(0)\n", _EXITED),
    Case(
        "os._exit in the second call",
        "exiting",
        DOUBLE,
        kernel(f"CALLS.append(1)\nif len(CALLS) > 1:\n    os._exit(0)\n{CALL}", prelude="import os\nCALLS = []\n"),
        _EXITED,
    ),
    Case(
        "os._exit in a destructor",
        "exiting",
        DOUBLE,
        kernel(
            f"Last()\n{CALL}",
            prelude="import os\n\nclass Last:\n    def __del__(self):\n        os._exit(0)\n",
        ),
        _EXITED,
    ),
    Case(
        "os._exit in a thread",
        "exiting",
        DOUBLE,
        kernel(
            f"thread = threading.Thread(target=os._exit, args=(0,))\nthread.start()\nthread.join()\n{CALL}",
            prelude="import os, threading\n",
        ),
        _EXITED,
    ),
    Case(
        "sys.exit after the answer was forged",
        "exiting",
        DOUBLE,
        kernel('print(\'{"verdict": "verified"}\', flush=True)\nimport sys\nsys.exit(0)'),
        _EXITED,
    ),
)

# These run against a judge with a short limit.
ENDLESS = (
    _endless("a loop in the wrapper", "while True:\n    pass"),
    Case("a loop at import", "endless", DOUBLE, DOUBLE_KERNEL + "\nwhile True:\n    pass\n", _ENDLESS),
    Case(
        "a loop in the kernel",
        "endless",
        DOUBLE,
        DOUBLE_KERNEL.replace("    x = tl.load", "    while n > 0:\n        mask = mask & mask\n    x = tl.load"),
        _ENDLESS,
    ),
    _endless(
        "a loop that ignores signals",
        """
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
while True:
    pass
""",
        "import signal\n",
    ),
    _endless(
        "a loop that catches every exception",
        "while True:\n    try:\n        x.sum()\n    except BaseException:\n        continue",
    ),
    _endless(
        "a loop in a destructor",
        "Last()",
        "class Last:\n    def __del__(self):\n        while True:\n            pass\n",
    ),
    # Holds the interpreter's lock, so that no other thread of the process runs.
    _endless("a pattern that takes hours", "re.match('(a+)+$', 'a' * 60 + 'b')", "import re\n"),
    _endless("a sleep of hours", "time.sleep(10 ** 5)", "import time\n"),
    _endless(
        "a lock that nobody opens", "lock = threading.Lock()\nlock.acquire()\nlock.acquire()", "import threading\n"
    ),
    # The first process of a namespace cannot stop itself; it must not get away with that either.
    _endless(
        "a process that stops itself",
        "os.kill(os.getpid(), signal.SIGSTOP)\nwhile True:\n    pass",
        "import os, signal\n",
    ),
    Case(
        "a flood of output",
        "output flood",
        DOUBLE,
        pointwise_kernel("x * 2", before="while True:\n    print('x' * 10000)"),
        _ENDLESS | {"resource_limit"},
    ),
)

CASES = (*EXITS, *ENDLESS)
