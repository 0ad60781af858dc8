"""What each operator weighs, what is free, and that memory nobody wrote to is poisoned."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from triton_sft_pipeline.verification.worker.operators import OperatorLog, _leaves_gpu
from triton_sft_pipeline_tests.verification.worker.interpreted import PRELUDE, Interpreted

pytestmark = pytest.mark.slow

WATCHED = (
    PRELUDE
    + """
interpreter.install()
monitor = LaunchMonitor("interpreter")
log = OperatorLog(monitor, poison=True)
x = torch.arange(64.0)
"""
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreted]:
    with Interpreted(tmp_path_factory.mktemp("operators")) as interpreted:
        yield interpreted


def _weigh(expression: str) -> tuple[float, float]:
    """(compute, copy) of an expression over a, a 4x8 tensor, b, an 8x16 one, and image, a 1x3x8x8 one."""
    import torch
    import torch.nn.functional as F

    log = OperatorLog()
    names: dict[str, Any] = {"torch": torch, "F": F}
    names |= {"a": torch.ones(4, 8), "b": torch.ones(8, 16), "image": torch.ones(1, 3, 8, 8)}
    with torch.no_grad():
        names["weight"] = torch.ones(5, 3, 3, 3)
        with log:
            eval(expression, names)
    return log.compute, log.copy


@pytest.mark.parametrize(
    "expression",
    [
        "a.view(32)",
        "a.t()[1:3].unsqueeze(0).expand(3, 2, 4)",
        "a.reshape(2, 16)",
        "a.split(2)",
        "a.contiguous()",
        "a.detach().to(torch.float32)",
        "torch.empty(100)",
        "torch.empty_like(a)",
        "a.new_empty(5)",
        "a[0, 0] + 1",
        "a[0, 0].item()",
        "a.clone",
    ],
)
def test_views_allocation_and_single_elements_are_free(expression: str) -> None:
    assert _weigh(expression) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("expression", "scalars"),
    [
        ("a[0, 0] + 1", 1),
        ("(a[0, 0] * 2).sqrt()", 2),
        ("a[0, 0].item() + a[0, 1].item()", 2),
        ("bool(a[0, 0] > 0)", 2),
        ("a[0, 0].clone()", 0),
        ("a[0]", 0),
        ("a + 1", 0),
    ],
)
def test_arithmetic_on_single_elements_and_reading_them_is_counted_apart(expression: str, scalars: int) -> None:
    import torch

    log = OperatorLog()
    with log:
        eval(expression, {"a": torch.ones(4, 8)})
    assert log.scalars == scalars


@pytest.mark.parametrize(
    ("expression", "elements"),
    [
        ("a.clone()", 32),
        ("a.t().contiguous()", 32),
        ("a.half()", 32),
        ("torch.empty(4, 8).copy_(a)", 32),
        ("torch.cat([a, a])", 64),
        ("torch.stack([a, a, a])", 96),
        ("a[[0, 1]]", 16),
        ("a.index_select(0, torch.tensor([2]))", 8),
        ("F.pad(a, (1, 1))", 40),
        ("a.repeat(2, 1)", 64),
        ("torch.flip(a, [0])", 32),
        ("F.interpolate(image, scale_factor=2)", 768),
        ("torch._foreach_copy_([torch.empty(4, 8)], [a])", 32),
    ],
)
def test_moving_data_is_a_copy(expression: str, elements: int) -> None:
    assert _weigh(expression) == (0.0, elements)


@pytest.mark.parametrize("expression", ["torch.zeros(100)", "torch.empty(100).fill_(3)", "torch.full((100,), 2.0)"])
def test_filling_is_a_tenth_of_a_copy(expression: str) -> None:
    assert _weigh(expression) == (0.0, 10.0)


@pytest.mark.parametrize(
    ("expression", "operations"),
    [
        ("a + 1", 32),
        ("a.add_(1)", 32),
        ("torch.add(a, a, out=torch.empty(4, 8))", 32),
        ("torch._foreach_add([a, a], 1.0)", 64),
        ("a.sum()", 32),
        ("a[0] + a", 32),
        ("torch.where(a > 0, a, -a)", 96),
        ("torch.softmax(a, 1)", 160),
        ("F.layer_norm(a, (8,))", 192),
        ("F.mse_loss(a, a)", 96),
        ("torch.rand(50)", 50),
        ("a @ b", 2 * 4 * 8 * 16),
        ("torch.addmm(torch.ones(16), a, b)", 2 * 4 * 8 * 16),
        ("torch.einsum('ij,jk->ik', a, b)", 2 * 4 * 8 * 16),
        ("torch.mv(b, torch.ones(16))", 2 * 8 * 16),
        ("F.conv2d(image, weight)", 2 * 5 * 6 * 6 * 3 * 3 * 3),
        ("F.max_pool2d(image, 2)", 192),
        ("F.max_pool2d(image, 3, stride=1)", 3 * 6 * 6 * 9),
        ("F.scaled_dot_product_attention(image, image, image)", 4 * 3 * 8 * 8 * 8),
        ("torch.index_put(a, [torch.tensor([0, 0])], torch.ones(2, 8), accumulate=True)", 16),
    ],
)
def test_arithmetic_is_compute(expression: str, operations: int) -> None:
    compute, _ = _weigh(expression)
    assert compute == operations


def test_layers_that_are_one_operator_weigh_as_much_as_their_matrix_products() -> None:
    compute, _ = _weigh("torch.nn.LSTM(8, 8)(a.view(4, 1, 8))")
    assert compute >= 2 * 4 * (8 * 32 + 8 * 32)
    layer = "torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()(a.view(1, 4, 8))"
    compute, _ = _weigh(layer)
    assert compute >= 2 * 4 * (8 * 24 + 8 * 8 + 2 * 8 * 16)


def test_inference_mode_hides_nothing() -> None:
    import torch

    log = OperatorLog()
    with torch.inference_mode(), log:
        torch.matmul(torch.ones(4, 8), torch.ones(8, 16))
        torch.nn.functional.linear(torch.ones(4, 8), torch.ones(16, 8))
    assert log.compute == 2 * 2 * 4 * 8 * 16


def test_the_operators_that_did_most_come_first_and_copies_only_when_nothing_was_computed() -> None:
    import torch

    log = OperatorLog()
    with log:
        torch.ones(4).clone()
    assert log.top(5) == [("aten.clone", 4.0), ("aten.ones", pytest.approx(0.4))]
    with log:
        torch.ones(4) + 1
        torch.ones(4, 4) @ torch.ones(4, 4)
    assert log.top(5) == [("aten.mm", 128.0), ("aten.add", 4.0)]
    assert log.top(1) == [("aten.mm", 128.0)]


def test_the_caller_hears_once_before_the_first_work() -> None:
    import torch

    log, heard = OperatorLog(), []
    log.before_compute = lambda: heard.append(log.compute)
    with log:
        x = torch.empty(4).view(2, 2)
        assert heard == []
        x.zero_()
        x + 1
    assert heard == [0.0]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("torch.empty(2)", [None, None]),
        ("torch.empty_like(torch.ones(2))", [None, None]),
        ("torch.ones(2).new_empty(1)", [None]),
        ("torch.empty_strided((2,), (2,))", [None, None]),
        ("torch.Tensor(2)", [None, None]),
        ("torch.empty(2, dtype=torch.float16)", [None, None]),
        ("torch.empty(2, dtype=torch.int8)", [127, 127]),
        ("torch.empty(1, dtype=torch.int64)", [2**63 - 1]),
        ("torch.empty(2, dtype=torch.bool)", [True, True]),
        ("torch.ones(2).resize_(4)", [1.0, 1.0, None, None]),
        ("torch.empty(2).fill_(5)", [5.0, 5.0]),
        ("torch.zeros(2)", [0.0, 0.0]),
    ],
)
def test_memory_that_nobody_wrote_to_is_poisoned(expression: str, expected: list[Any]) -> None:
    import torch

    with OperatorLog(poison=True):
        tensor = eval(expression, {"torch": torch})
    assert [None if value != value else value for value in tensor.tolist()] == expected


def test_without_poison_a_resized_tensor_is_left_alone() -> None:
    import torch

    storage = torch.ones(4)
    with OperatorLog():
        assert storage[:2].resize_(4).tolist() == [1.0] * 4


def test_what_the_interpreter_copies_for_a_launch_is_not_logged(interpreted: Interpreted) -> None:
    code = """
    with log:
        y = launch(x, torch.empty_like(x))
    result = [log.compute, log.copy, torch.equal(y, 2 * x)]
    """
    assert interpreted.run(code, WATCHED) == [0.0, 0.0, True]


def test_operators_in_a_grid_are_the_kernels_own(interpreted: Interpreted) -> None:
    code = """
    with log:
        y = torch.empty_like(x)
        double[lambda meta: (1 if y.copy_(x + x) is y else 1,)](x, torch.empty(64), 64, BLOCK=32)
    result = [log.compute, log.copy]
    """
    assert interpreted.run(code, WATCHED) == [64.0, 64.0]


def test_an_operator_of_the_kernels_own_is_looked_into(interpreted: Interpreted) -> None:
    code = """
    @torch.library.custom_op("mine::by_triton", mutates_args=())
    def by_triton(x: torch.Tensor) -> torch.Tensor:
        return launch(x, torch.empty_like(x))

    @torch.library.custom_op("mine::by_torch", mutates_args=())
    def by_torch(x: torch.Tensor) -> torch.Tensor:
        return x.view(8, 8) @ x.view(8, 8)

    with log:
        by_triton(x)
    first = log.compute
    with log:
        by_torch(x)
    result = [first, log.top(3), monitor.count]
    """
    assert interpreted.run(code, WATCHED) == [0.0, [["aten.mm", 1024.0]], 1]


def test_a_log_that_was_taken_off_says_so(interpreted: Interpreted) -> None:
    code = """
    from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode
    with log:
        _pop_mode()
    covered = OperatorLog(monitor)
    with covered:
        TorchDispatchMode().__enter__()
    result = [log.intact, covered.intact, OperatorLog(monitor).intact, _get_current_dispatch_mode() is None]
    """
    assert interpreted.run(code, WATCHED) == [False, False, True, True]


def test_what_leaves_the_gpu_counts_as_compute() -> None:
    def tensor(place: str) -> Any:
        return SimpleNamespace(device=SimpleNamespace(type=place), numel=lambda: 8, untyped_storage=None)

    assert _leaves_gpu((tensor("cuda"),), tensor("cpu"))
    assert not _leaves_gpu((tensor("cpu"),), tensor("cuda"))
    assert not _leaves_gpu((tensor("cuda"),), tensor("cuda"))
