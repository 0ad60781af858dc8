"""What a child can see and use: with namespaces as root or in a user namespace, and without any."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import triton_sft_pipeline
from triton_sft_pipeline.verification.sandbox.client import ZygoteClient
from triton_sft_pipeline.verification.sandbox.confine import NAMESPACES, PROCESS, allowed_environment
from triton_sft_pipeline_tests.verification.sandbox.boxes import LIMITS, answer, processes_named, talk, zygote

PROJECT = Path(triton_sft_pipeline.__file__).parents[1]
SECRET = "SANDBOX_TEST_TOKEN"
# Says the error that each of the attempts raises, "" for none.
ATTEMPTS = """
import os
def attempt(action):
    try:
        action()
    except OSError as error:
        return error.strerror or str(error)
    return ""
"""


@pytest.fixture(scope="module", params=["auto", "user", PROCESS])
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZygoteClient]:
    """A zygote of each kind that this machine allows."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(SECRET, "a secret")
        with zygote(tmp_path_factory.mktemp("judge"), request.param) as client:
            if request.param != PROCESS and client.isolation == PROCESS:
                pytest.skip(f"no namespaces here: {client.isolation_reason}")
            yield client


@pytest.fixture
def closed_box(box: ZygoteClient) -> ZygoteClient:
    """Only those with namespaces."""
    if box.isolation != NAMESPACES:
        pytest.skip("this level does not promise that")
    return box


def test_the_level_without_namespaces_says_why_it_is_not_more(tmp_path: Path) -> None:
    with zygote(tmp_path, PROCESS) as client:
        assert (client.isolation, client.isolation_reason) == (PROCESS, "it was asked for")


def test_it_sees_nothing_of_the_project_nor_of_users(closed_box: ZygoteClient) -> None:
    here, test = str(PROJECT / "pyproject.toml"), str(Path(__file__).resolve())
    code = f"""
        import os
        say([os.path.exists(path) for path in ({here!r}, {test!r}, "/home", "/etc/shadow", "/var")])
    """
    assert not any(answer(closed_box, code))


def test_it_is_the_first_of_its_processes_and_sees_no_other(closed_box: ZygoteClient) -> None:
    code = "import os; say([os.getpid(), sorted(name for name in os.listdir('/proc') if name.isdigit())])"
    assert answer(closed_box, code) == [1, ["1"]]


def test_libraries_that_are_not_loaded_yet_can_be_imported(box: ZygoteClient) -> None:
    code = """
        import sys
        names = ("sqlite3", "wave", "hypothesis")
        new = [name for name in names if name not in sys.modules]
        say([__import__(name).__name__ for name in new])
    """
    assert "sqlite3" in answer(box, code)


def test_the_projects_own_modules_cannot_be_imported_anew(closed_box: ZygoteClient) -> None:
    code = """
        import sys
        loaded = "triton_sft_pipeline.definitions" in sys.modules
        try:
            import triton_sft_pipeline.definitions
        except ImportError as error:
            say([loaded, str(error)])
    """
    assert answer(closed_box, code) == [False, "No module named 'triton_sft_pipeline.definitions'"]


def test_only_scratch_can_be_written(closed_box: ZygoteClient) -> None:
    places = ["/x", "/usr/x", "/etc/passwd", f"{sys.prefix}/x", "/proc/sys/kernel/hostname", "/dev/x", "/root/x"]
    code = f"""
        {ATTEMPTS.replace(chr(10), chr(10) + " " * 8)}
        say([bool(attempt(lambda: open(place, "w").write("x"))) for place in {places}]
            + [attempt(lambda: open("mine", "w").write("x")), attempt(lambda: open("/dev/shm/mine", "w").write("x"))])
    """
    assert answer(closed_box, code) == [True] * len(places) + ["", ""]


def test_scratch_is_where_tools_look_for_a_place_to_write(box: ZygoteClient) -> None:
    code = """
        import os, tempfile
        from pathlib import Path
        with tempfile.NamedTemporaryFile() as file:
            say([os.getcwd(), os.environ["HOME"], os.environ["TRITON_CACHE_DIR"], str(Path(file.name).parent)])
    """
    here, home, cache, temporary = answer(box, code)
    assert home == temporary == here and cache == f"{here}/triton"


def test_no_network_is_reached(box: ZygoteClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
            import socket
            try:
                socket.create_connection(("127.0.0.1", {port}), timeout=5)
            except OSError as error:
                say(str(error))
        """
        assert answer(box, code)


def test_no_service_of_the_users_is_reached(box: ZygoteClient) -> None:
    with socket.socket(socket.AF_UNIX) as service:
        # In no folder, so that hiding files is not what keeps it away.
        name = f"\0service-{os.getpid()}-{box.isolation}"
        service.bind(name)
        service.listen()
        code = f"""
            import socket
            try:
                socket.socket(socket.AF_UNIX).connect({name!r})
            except OSError as error:
                say(str(error))
        """
        assert answer(box, code)


def test_it_has_no_rights_to_gain_others_with(box: ZygoteClient) -> None:
    code = """
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        say([int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb", "CapBnd", "NoNewPrivs")])
    """
    assert answer(box, code)[:4] == [0, 0, 0, 0]
    assert answer(box, code)[5] == 1


def test_calls_that_have_let_programs_out_of_sandboxes_are_refused(box: ZygoteClient) -> None:
    code = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        refused = []
        for call in (lambda: libc.unshare(0x10000000), lambda: libc.mount(b"x", b"/usr", b"tmpfs", 0, None),
                     lambda: libc.ptrace(0, 0, 0, 0), lambda: libc.setns(0, 0), lambda: libc.chroot(b"/")):
            refused.append((call(), ctypes.get_errno()))
        say(refused)
    """
    assert answer(box, code) == [[-1, 1]] * 5


def test_each_child_has_a_user_of_its_own_where_root_can_give_it_one(box: ZygoteClient) -> None:
    if os.getuid() != 0 or answer(box, "import os; say(os.getuid())") == 0:
        pytest.skip("children keep the user's id")
    with talk(box, "import os; say(os.getresuid()); hear()") as first:
        with talk(box, "import os; say(os.getresuid()); hear()") as second:
            one, other = first.hear(), second.hear()
    assert len({*one}) == len({*other}) == 1
    assert one != other


def test_it_has_only_its_socket_and_the_standard_three(box: ZygoteClient) -> None:
    code = """
        import os
        def is_open(fd):
            try:
                return bool(os.fstat(fd))
            except OSError:
                return False
        say([fd for fd in range(1024) if is_open(fd)])
    """
    assert answer(box, code) == [0, 1, 2, 3]


def test_the_environment_holds_no_secret(box: ZygoteClient) -> None:
    seen = answer(box, "import os; say(dict(os.environ))")
    assert SECRET not in seen and "PYTHONPATH" not in seen


def test_the_allowed_environment_leaves_tokens_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET, "a secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    environment = allowed_environment(["/libraries"])
    assert SECRET not in environment
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["PYTHONPATH"]) == ("3", "/libraries")


def test_scratch_ends_where_its_limit_is_in_bytes_and_in_files(closed_box: ZygoteClient) -> None:
    code = """
        written = 0
        try:
            while True:
                with open(f"big{written}", "wb") as file:
                    written += file.write(bytes(1 << 20))
        except OSError as error:
            say([written, error.strerror])
        import os
        for name in os.listdir("."):
            os.unlink(name)
        made = 0
        try:
            while True:
                os.mkdir(f"folder{made}")
                made += 1
        except OSError as error:
            say([made, error.strerror])
    """
    with talk(closed_box, code) as child:
        assert child.hear() == [8 << 20, "No space left on device"]
        made, reason = child.hear()
    assert made <= 20_000 and reason == "No space left on device"


def test_a_file_ends_at_its_limit(box: ZygoteClient) -> None:
    code = """
        try:
            open("big", "wb").write(bytes(2 << 20))
        except OSError as error:
            say(error.strerror)
    """
    assert answer(box, code) == "File too large"


def test_memory_ends_at_its_limit(box: ZygoteClient) -> None:
    code = """
        try:
            kept = bytearray(2 << 30)
        except MemoryError:
            say("enough")
    """
    assert answer(box, code) == "enough"


def test_memory_that_no_process_limit_counts_is_noticed(box: ZygoteClient) -> None:
    code = """
        import mmap
        shared = mmap.mmap(-1, 512 << 20)
        say("begun")
        for at in range(0, len(shared), 4096):
            shared[at] = 1
        hear()
    """
    with talk(box, code, replace(LIMITS, data_bytes=128 << 20)) as child:
        assert child.hear() == "begun"
        end = child.end()
    assert end.signal == "SIGKILL"
    assert "exceed its memory limit" in end.output


def test_processor_time_ends_at_its_limit(box: ZygoteClient) -> None:
    with talk(box, "while True: pass", replace(LIMITS, cpu_s=1)) as child:
        assert child.end().signal in ("SIGKILL", "SIGXCPU")


def test_a_fork_bomb_stays_small_and_is_gone_within_a_second(box: ZygoteClient) -> None:
    if answer(box, "import os; say(os.getuid())") == 0:
        pytest.skip("the kernel does not limit root's processes")
    code = """
        import os
        alive = 1
        try:
            while os.fork():
                alive += 1
        except OSError:
            say(alive)
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """
    with talk(box, code) as child:
        assert child.hear() <= LIMITS.processes
        began = time.monotonic()
        child.child.kill()
        child.end()
        assert time.monotonic() - began < 1


def test_what_was_started_in_other_sessions_dies_with_it(box: ZygoteClient, tmp_path: Path) -> None:
    marker = f"stray-{tmp_path.name}-{os.getpid()}-{box.isolation}"
    code = f"""
        import os
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.dup2(write, 1)
                os.execv("/bin/sh", ["{marker}", "-c", "trap '' TERM HUP; echo up; read never < /dev/zero"])
            os._exit(0)
        os.wait()
        os.read(read, 1)
        say("up")
        hear()
    """
    with talk(box, code) as child:
        assert child.hear() == "up"
        assert len(processes_named(marker)) == 1
        child.go_on()
        assert child.end().exit_code == 0
        assert not processes_named(marker)


def test_killing_takes_along_what_ignores_signals(box: ZygoteClient, tmp_path: Path) -> None:
    marker = f"deaf-{tmp_path.name}-{os.getpid()}-{box.isolation}"
    code = f"""
        import os, signal
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        read, write = os.pipe()
        for _ in range(5):
            if os.fork() == 0:
                os.setsid()
                os.dup2(write, 1)
                os.execv("/bin/sh", ["{marker}", "-c", "echo up; read never < /dev/zero"])
            os.read(read, 3)
        say("up")
        while True:
            pass
    """
    with talk(box, code) as child:
        assert child.hear() == "up"
        assert len(processes_named(marker)) == 5
        began = time.monotonic()
        child.child.kill()
        assert child.end().signal == "SIGKILL"
        assert time.monotonic() - began < 1
        assert not processes_named(marker)


def test_the_user_s_processes_cannot_be_signalled(box: ZygoteClient) -> None:
    targets = [os.getpid(), os.getppid(), -1]
    code = f"""
        {ATTEMPTS.replace(chr(10), chr(10) + " " * 8)}
        say([attempt(lambda: os.kill(target, 0)) for target in {targets}])
    """
    refused = answer(box, code)
    assert refused[:2] != ["", ""]
    # With namespaces, "all" are those of the child alone.
    assert refused[2] or box.isolation == NAMESPACES


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_a_c_compiler_works(box: ZygoteClient) -> None:
    code = """
        import ctypes, subprocess
        open("lib.c", "w").write("int seven(void) { return 7; }")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", "lib.so", "lib.c"], check=True)
        say(ctypes.CDLL("./lib.so").seven())
    """
    assert answer(box, code) == 7


def test_nothing_of_a_child_is_left_in_the_judges_folder(box: ZygoteClient) -> None:
    code = """
        import os
        for _ in range(600):
            os.mkdir("a-name-that-makes-paths-long")
            os.chdir("a-name-that-makes-paths-long")
        os.mkdir("locked")
        os.chmod("locked", 0)
        say("deep")
    """
    with talk(box, code) as child:
        assert child.hear() == "deep"
        child.end()
    folder: Any = box._folder
    assert not list(folder.glob("scratch-*"))
