"""Too many processes, too much memory, too many files, and what keeps running after the answer.

The bombs are small enough to do no harm where nothing stops them.
"""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import CALL, DOUBLE, Case, kernel

_SHORT = frozenset({"resource_limit", "runtime_error", "forbidden_construct", "sandbox_violation"})
_BOMB = frozenset(
    {"process_leak", "thread_leak", "resource_limit", "runtime_error", "forbidden_construct", "sandbox_violation"}
)
_LEFT = frozenset({"process_leak", "thread_leak", "forbidden_construct", "sandbox_violation"})


def _short(name: str, before: str, prelude: str = "") -> Case:
    return Case(name, "huge allocation", DOUBLE, kernel(f"{before}\n{CALL}", prelude=prelude), _SHORT)


def _bomb(name: str, before: str, prelude: str = "import os, signal\n", verdicts: frozenset[str] = frozenset()) -> Case:
    return Case(name, "fork bomb", DOUBLE, kernel(f"{before}\n{CALL}", prelude=prelude), _BOMB | verdicts)


def _left(name: str, before: str, prelude: str) -> Case:
    return Case(name, "left running", DOUBLE, kernel(f"{before}\n{CALL}", prelude=prelude), _LEFT)


CASES = (
    _short("a huge tensor", "torch.zeros(1 << 44)"),
    _short("a huge array of bytes", "kept = bytearray(1 << 46)"),
    # Claimed and never touched, so that it costs the host nothing where there is no limit.
    _short(
        "memory that grows without end",
        "kept = []\nwhile True:\n    kept.append(mmap.mmap(-1, 1 << 36, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))",
        "import mmap\n",
    ),
    _short("a huge list", "kept = [None] * (1 << 44)"),
    _short("a huge file", "open('huge', 'wb').truncate(1 << 40)"),
    _short("a file that grows without end", "file = open('large', 'wb')\nwhile True:\n    file.write(bytes(1 << 24))"),
    _short("files without end", "kept = []\nwhile True:\n    kept.append(open('small', 'wb'))"),
    _bomb(
        "a fork bomb",
        "for number in range(100):\n    if os.fork() == 0:\n        while True:\n            signal.pause()",
    ),
    _bomb(
        "a fork bomb that takes no for an answer",
        """
for number in range(100):
    try:
        if os.fork() == 0:
            while True:
                signal.pause()
    except OSError:
        pass
""".strip(),
    ),
    _bomb(
        "a fork bomb that doubles",
        "first = os.getpid()\nfor number in range(5):\n    os.fork()\nif os.getpid() != first:\n"
        "    while True:\n        signal.pause()",
        # In its second call it reaches the limit: several processes fail at once, and each of them answers.
        verdicts=frozenset({"forged_result"}),
    ),
    _bomb(
        "a fork bomb of threads",
        "for number in range(100):\n    threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "import threading\n",
    ),
    _left(
        "a process that goes on",
        "subprocess.Popen(['sleep', '1000'])",
        "import subprocess\n",
    ),
    _left(
        "a process that goes on in its own session",
        "subprocess.Popen(['sleep', '1000'], start_new_session=True)",
        "import subprocess\n",
    ),
    _left(
        "a fork that goes on",
        "if os.fork() == 0:\n    while True:\n        signal.pause()",
        "import os, signal\n",
    ),
    _left(
        "a daemon",
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            signal.pause()
    os._exit(0)
os.wait()
""".strip(),
        "import os, signal\n",
    ),
    _left(
        "a process by a name put together at run time",
        "getattr(__import__('sub' + 'process'), 'Po' + 'pen')(['sleep', '1000'])",
        "\n",
    ),
    _left(
        "a thread that goes on",
        "threading.Thread(target=threading.Event().wait, daemon=True).start()",
        "import threading\n",
    ),
    _left(
        "a thread below the threading module",
        "_thread.start_new_thread(forever, ())",
        "import _thread, threading\n\ndef forever():\n    threading.Event().wait()\n",
    ),
    _left(
        "a timer that fires later",
        "timer = threading.Timer(1000, print)\ntimer.daemon = True\ntimer.start()",
        "import threading\n",
    ),
    _left(
        "a pool that is not closed",
        "POOL.submit(print).result()",
        "from concurrent.futures import ThreadPoolExecutor\nPOOL = ThreadPoolExecutor(2)\n",
    ),
    Case(
        "a thread that writes the answer after the wrapper has returned",
        "left running",
        DOUBLE,
        kernel(
            "y = torch.empty_like(x)\nthreading.Thread(target=later, args=(x, y), daemon=True).start()\nreturn y",
            prelude="""
            import threading

            def later(x, y):
                threading.Event().wait(0.05)
                pointwise[(1,)](x, y, x.numel(), BLOCK=32)
            """,
        ),
        _LEFT
        | {"no_kernel_launch", "incorrect_numerical", "incorrect_nan", "lazy_output", "early_exit", "forged_result"},
    ),
)
