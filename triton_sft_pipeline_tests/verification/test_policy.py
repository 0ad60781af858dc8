"""When PyTorch did the work, when it helped, and when it did nothing."""

from __future__ import annotations

from triton_sft_pipeline.verification.policy import FALLBACK_SHARE, Ruling, Work, judge_operators


def _verdict(ruling: Ruling) -> str:
    return "verified" if ruling.finding is None else ruling.finding.verdict


def test_a_kernel_that_does_all_the_work_is_verified() -> None:
    ruling = judge_operators(Work(), Work(compute=100.0), launches=1)
    assert ruling == Ruling(None, 0.0)


def test_folding_a_few_partial_sums_is_a_hybrid() -> None:
    ruling = judge_operators(Work(2.0, operators=("aten.sum",)), Work(compute=1000.0), launches=1)
    assert ruling.finding is not None and ruling.finding.verdict == "verified_hybrid"
    assert ruling.finding.detail == "PyTorch did less than 1 % of the reference's work: aten.sum."
    assert ruling.torch_share == 0.002


def test_a_convolution_by_pytorch_under_a_triton_activation_is_a_fallback() -> None:
    reference = Work(compute=1000.0, copy=10.0)
    ruling = judge_operators(Work(980.0, operators=("aten.convolution",)), reference, launches=3)
    assert ruling.finding is not None and ruling.finding.verdict == "torch_fallback"
    assert ruling.finding.detail == "PyTorch itself did 98 % of the reference's work: aten.convolution."


def test_half_of_the_work_is_the_limit() -> None:
    reference = Work(compute=1000.0)
    below, at = 1000 * FALLBACK_SHARE - 1, 1000 * FALLBACK_SHARE
    assert _verdict(judge_operators(Work(below), reference, launches=1)) == "verified_hybrid"
    assert _verdict(judge_operators(Work(at), reference, launches=1)) == "torch_fallback"


def test_copies_are_free_where_the_reference_computes() -> None:
    ruling = judge_operators(Work(copy=5000.0, operators=("aten.clone",)), Work(compute=100.0), launches=1)
    assert ruling == Ruling(None, 0.0)


def test_where_the_reference_only_moves_data_moving_it_by_pytorch_is_a_fallback() -> None:
    reference = Work(copy=100.0)
    assert _verdict(judge_operators(Work(copy=100.0), reference, launches=1)) == "torch_fallback"
    assert _verdict(judge_operators(Work(compute=100.0), reference, launches=1)) == "torch_fallback"
    # Filling the output before the kernel writes to it is no work of the reference's.
    assert _verdict(judge_operators(Work(copy=10.0), reference, launches=1)) == "verified"


def test_where_the_reference_returns_a_view_cloning_it_is_a_fallback() -> None:
    clone = Work(copy=64.0, operators=("aten.clone",))
    assert _verdict(judge_operators(clone, Work(), launches=1, output_elements=64)) == "torch_fallback"
    assert judge_operators(Work(), Work(), launches=1, output_elements=64) == Ruling(None, 0.0)


def test_there_is_no_share_of_a_reference_that_does_nothing() -> None:
    assert judge_operators(Work(), Work(), launches=1) == Ruling(None, None)
    ruling = judge_operators(Work(8.0, operators=("aten.add",)), Work(), launches=1)
    assert ruling.finding is not None and ruling.finding.verdict == "verified_hybrid"
    assert ruling.finding.detail == "PyTorch did part of the arithmetic: aten.add."


def test_without_a_launch_it_is_said_who_did_the_work() -> None:
    ruling = judge_operators(Work(100.0, operators=("aten.mm",)), Work(compute=100.0), launches=0)
    assert ruling.finding is not None and ruling.finding.verdict == "no_kernel_launch"
    assert ruling.finding.detail == "The code launches no Triton kernel; PyTorch did the work: aten.mm."
    assert ruling.torch_share == 1.0


def test_a_detail_names_three_operators_at_most() -> None:
    ruling = judge_operators(Work(90.0, operators=tuple("abcde")), Work(compute=100.0), launches=1)
    assert ruling.finding is not None and ruling.finding.detail.endswith(": a, b, c.")
