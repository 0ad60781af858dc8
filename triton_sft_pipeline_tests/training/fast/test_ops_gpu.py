"""Every kernel against its twin on a GPU: at Trinity-Mini's sizes, and at small odd ones."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from triton_sft_pipeline.training.fast import kernels_nf4, kernels_rows, ops, twins
from triton_sft_pipeline_tests.training.fast import kernel_cases
from triton_sft_pipeline_tests.training.fast.kernel_cases import CASES, SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not os.environ.get("TRITON_SFT_TEST_GPU"), reason="TRITON_SFT_TEST_GPU is not set"),
]

TRINITY = replace(kernel_cases.TRINITY, tokens=1024, device="cuda")
SIZES = {
    "trinity": TRINITY,
    "trinity-float32": replace(TRINITY, tokens=100, dtype=torch.float32),
    **{f"small-{number}": replace(size, device="cuda") for number, size in enumerate(SMALL)},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_computes_what_its_twin_does_on_the_gpu(case: str, size: str) -> None:
    CASES[case](SIZES[size])


def test_weights_looked_up_in_memory_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_nf4, "SHUFFLE", False)
    CASES["weights"](TRINITY)


def test_the_mask_of_dropout_is_the_cpus() -> None:
    x = torch.ones(4096, 2048)
    on_gpu = ops.dropout(x.cuda(), 0.05, 2**31 - 1)
    assert torch.equal(on_gpu.cpu() == 0, twins.dropout(x, 0.05, 2**31 - 1) == 0)


def test_no_operation_waits_for_the_device() -> None:
    """A wait would stall the launches of a whole layer."""
    index = TRINITY.index()
    x, weights = TRINITY.normal(1024, 2048), torch.rand(1024, 8, device="cuda")
    codes = torch.zeros(2, 128, 32, dtype=torch.uint8, device="cuda")
    scales = torch.zeros(2, 128, device="cuda")
    out = torch.empty(2, 128, 64, dtype=torch.bfloat16, device="cuda")
    ops.dequantize(codes, scales, None, None, "nf4", out)  # makes the tables of this device, once
    heads, sums = x.view(1, 1024, 16, 128), torch.zeros(4, 16, 256, device="cuda")
    wide = torch.empty(4, 64, 80, dtype=torch.bfloat16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, inverse, tokens, _ = ops.sort_routes(index, 128)
        rows, _ = ops.gather(x, tokens, 0.05, 3)
        ops.combine(rows, inverse, weights)
        ops.dequantize(codes, scales, None, None, "nf4", out)
        *turned, turned_sums = ops.reverse_blocks((heads,), (heads, heads), 256, sums)
        ops.merge_blocks(heads, sums, turned[0], turned_sums)
        ops.add_reversed(heads, heads.clone(), heads.clone(), turned, 256)
        ops.fill_b(x[:64, :32].view(64, 8, 4).permute(2, 0, 1), wide[..., 64:])
        ops.join_b(wide[..., 64:72])
        ends, factor = ops.sort_routes(index, 128)[3], x.view(128, 8, 2048)
        ops.outer(ops.expand(ops.shrink(rows, factor.transpose(1, 2), ends), factor, ends), rows[:, :8], ends)
        dropped = ops.gate_mul_dropout(x, x, 0.05, 3)[1]
        ops.gate_mul_dropout_backward(dropped, dropped, x, x, torch.empty_like(x), 0.05, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_operations_draw_new_masks_from_a_new_seed() -> None:
    x, index, seed = TRINITY.normal(256, 2048), TRINITY.index()[:256], torch.tensor([3], device="cuda")
    codes, absmax, nested, offset, _ = kernel_cases._codes(TRINITY, 2, 128, 2048)
    weight = torch.empty(2, 128, 2048, dtype=torch.bfloat16, device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        _, inverse, tokens, _ = ops.sort_routes(index, 128)
        weights, _ = ops.router(x[:, :128], x[0, :128], 8, 2.8)
        rows, dropped = ops.gather(x, tokens, 0.05, seed)
        mixed = ops.combine(ops.dropout(dropped, 0.1, seed), inverse, weights)
        return rows, dropped, mixed, ops.dequantize(codes, absmax, nested, offset, "nf4", weight)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number in (3, 2**31 - 1, 2**40):
        seed.fill_(number)
        weight.zero_()
        graph.replay()
        found = [tensor.clone() for tensor in captured]
        for mine, expected in zip(found, step(), strict=True):
            assert torch.equal(mine, expected)
        assert torch.equal(found[1], ops.gather(x, ops.sort_routes(index, 128)[2], 0.05, number)[1])


def test_a_new_seed_or_length_compiles_nothing_new() -> None:
    x = torch.ones(64, 2048, device="cuda")
    ops.dropout(x, 0.05, 5)
    before = sum(len(entry[0]) for entry in kernels_rows._dropout.device_caches.values())
    for seed, rows in ((1, 64), (16, 63), (2**31 - 1, 1), (7, 17)):
        ops.dropout(x[:rows], 0.05, seed)
    assert sum(len(entry[0]) for entry in kernels_rows._dropout.device_caches.values()) == before
