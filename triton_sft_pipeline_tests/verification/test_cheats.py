"""Wrong and hostile kernels are refused, each with a verdict that names what is wrong with it."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from pathlib import Path

import pytest

from triton_sft_pipeline.verification import VERDICTS, JudgeItem, KernelJudge, Verdict
from triton_sft_pipeline.verification.gate import inspect_source
from triton_sft_pipeline_tests.verification.cheats import CHEATS, KINDS
from triton_sft_pipeline_tests.verification.cheats.endings import ENDLESS
from triton_sft_pipeline_tests.verification.snippets import CALL, DOUBLE, DOUBLE_KERNEL, Case, kernel, pointwise_kernel

CORRECT = {"verified", "verified_hybrid"}
_GATE = "triton_sft_pipeline.verification.judge.inspect_source"
PATIENT = [case for case in CHEATS if case not in ENDLESS]


def check(case: Case, judge: KernelJudge) -> None:
    verdict = judge.verify(case.pytorch_code, case.triton_code, key=case.name)
    if case.needs_namespaces and verdict.isolation != "namespaces":
        pytest.skip(f"this host gives the judge no namespaces: {verdict.isolation}")
    assert verdict.verdict in case.verdicts, verdict.detail
    assert case.mentions in verdict.detail
    assert not verdict.correctness and not verdict.fast_0 and verdict.detail


@pytest.mark.parametrize("case", PATIENT, ids=lambda case: case.name)
def test_a_cheat_is_refused_by_name(case: Case, judge: KernelJudge) -> None:
    check(case, judge)


@pytest.fixture(scope="module")
def endless_verdicts(impatient_judge: KernelJudge) -> dict[str, Verdict]:
    """Side by side, as each takes as long as the limit, and without the gate, which refuses some of them unread."""
    items = [JudgeItem(key=case.name, pytorch_code=case.pytorch_code, triton_code=case.triton_code) for case in ENDLESS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_GATE, lambda code: None)
        return {verdict.key: verdict for verdict in impatient_judge.verify_many(items)}


@pytest.mark.parametrize("case", ENDLESS, ids=lambda case: case.name)
def test_a_kernel_that_never_ends_is_stopped_at_its_limit(case: Case, endless_verdicts: dict[str, Verdict]) -> None:
    verdict = endless_verdicts[case.name]
    assert verdict.verdict in case.verdicts - {"forbidden_construct"}, verdict.detail
    assert not verdict.correctness


# Cases that are accepted when the gate is off, each with the reason. Names may only be taken out.
ACCEPTED_WITHOUT_THE_GATE = {
    "NumPy and a kernel that takes one away": "arithmetic outside of PyTorch is in no log; no argument is the answer",
    "plain Python by apply_ and a kernel that takes one away": "as with NumPy; a GPU's tensors have no apply_",
}
# What does not parse or defines nothing needs no run, and fails with other words when it gets one.
_STOPPED_AT_THE_GATE = [
    case for case in PATIENT if case.kind != "broken code" and inspect_source(case.triton_code) is not None
]


@pytest.fixture
def no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_GATE, lambda code: None)


@pytest.mark.usefixtures("no_gate")
@pytest.mark.parametrize(
    "case",
    [case for case in _STOPPED_AT_THE_GATE if case.name not in ACCEPTED_WITHOUT_THE_GATE],
    ids=lambda case: case.name,
)
def test_what_the_gate_refuses_is_refused_without_it_too(case: Case, judge: KernelJudge) -> None:
    check(case, judge)


@pytest.mark.usefixtures("no_gate")
@pytest.mark.parametrize("name", sorted(ACCEPTED_WITHOUT_THE_GATE))
def test_what_only_the_gate_stops_is_known_by_name(name: str, judge: KernelJudge) -> None:
    case = next(case for case in _STOPPED_AT_THE_GATE if case.name == name)
    verdict = judge.verify(case.pytorch_code, case.triton_code)
    assert verdict.correctness, f"It is refused now, as {verdict.verdict}: take its name out of the list."


def test_the_judge_still_verifies_after_all_of_them(judge: KernelJudge) -> None:
    assert judge.verify(DOUBLE, DOUBLE_KERNEL).verdict == "verified"


def test_a_kernel_can_neither_read_nor_delete_the_files_of_the_user(judge: KernelJudge, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    witness.write_text("untouched")
    prelude = "import shutil\nfrom pathlib import Path\n"
    acts = {
        "read": f"assert Path({str(witness)!r}).read_text() == 'untouched'",
        "overwrite": f"Path({str(witness)!r}).write_text('touched')",
        "delete": f"Path({str(witness)!r}).unlink()",
        "delete the folder": f"shutil.rmtree({str(tmp_path)!r})",
    }
    if judge.verify(DOUBLE, DOUBLE_KERNEL).isolation != "namespaces":
        pytest.skip("this host gives the judge no namespaces")
    verdicts = {name: judge.verify(DOUBLE, kernel(f"{act}\n{CALL}", prelude=prelude)) for name, act in acts.items()}
    assert not {name for name, verdict in verdicts.items() if verdict.correctness}
    assert witness.read_text() == "untouched"


def test_a_kernel_reaches_no_socket_of_the_host(judge: KernelJudge) -> None:
    if judge.verify(DOUBLE, DOUBLE_KERNEL).isolation != "namespaces":
        pytest.skip("this host gives the judge no namespaces")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as hidden:
        # A name in the abstract namespace, which belongs to the network and not to the file system.
        hidden.bind(b"\0witness-%d" % server.getsockname()[1])
        hidden.listen()
        port = server.getsockname()[1]
        attempts = {
            "tcp": f"socket.create_connection(('127.0.0.1', {port}), timeout=5)",
            "abstract": f"socket.socket(socket.AF_UNIX).connect(b'\\0witness-{port}')",
        }
        code = {name: kernel(f"{attempt}\n{CALL}", prelude="import socket\n") for name, attempt in attempts.items()}
        verdicts = {name: judge.verify(DOUBLE, text) for name, text in code.items()}
    assert not {name for name, verdict in verdicts.items() if verdict.correctness}


def test_what_a_kernel_started_and_wrote_is_gone_after_its_verdict(judge: KernelJudge) -> None:
    # No other process on the host has this argument.
    mark = f"1000.{threading.get_native_id()}"
    before = f"""\
        import subprocess
        for alone in (False, True):
            subprocess.Popen(["sleep", {mark!r}], start_new_session=alone)
        open("left-behind", "w").write("something")
        raise KeyError("started")
    """
    verdict = judge.verify(DOUBLE, pointwise_kernel("x * 2", before=before))
    assert verdict.verdict in ("runtime_error", "forbidden_construct", "sandbox_violation"), verdict.detail
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _content(path)]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_every_kind_of_attack_has_a_case_and_every_case_a_name_of_its_own() -> None:
    kinds = Counter(case.kind for case in CHEATS)
    assert set(kinds) == KINDS
    assert len(CHEATS) >= 60
    assert len({case.name for case in CHEATS}) == len(CHEATS)
    assert len({(case.pytorch_code, case.triton_code) for case in CHEATS}) == len(CHEATS)


def test_no_case_allows_a_right_verdict_or_a_failure_of_the_judge() -> None:
    assert not [case.name for case in CHEATS if case.verdicts & (CORRECT | {"infra_error", "reference_error"})]
    assert not [case.name for case in CHEATS if not case.verdicts]


def test_every_verdict_that_a_case_allows_exists() -> None:
    assert set().union(*(case.verdicts for case in CHEATS)) <= VERDICTS.keys()
