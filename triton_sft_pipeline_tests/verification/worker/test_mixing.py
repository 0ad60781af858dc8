"""Inputs made of two draws are as the draws in everything but their values, and the same for everyone with the seed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from triton_sft_pipeline.verification.worker import mixing

FLOAT8 = "float8_e4m3fn"
DTYPES = [
    "float64", "float32", "float16", "bfloat16", FLOAT8, "int64", "int32", "int16", "int8", "uint8", "bool",
    "complex64", "complex128",
]  # fmt: skip


def draw(dtype: str, value: int, shape: tuple[int, ...] = (8, 16)) -> Any:
    import torch

    return torch.full(shape, value).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_comes_from_one_draw_and_both_draws_appear(dtype: str) -> None:
    import torch

    a, b = draw(dtype, 0), draw(dtype, 1)
    (mixed,) = mixing.mix((a,), (b,), 7)
    assert (mixed.dtype, mixed.shape, mixed.stride()) == (a.dtype, a.shape, a.stride())
    ones = mixed.to(torch.complex128) == 1
    zeros = mixed.to(torch.complex128) == 0
    assert bool((ones | zeros).all()) and 30 < int(ones.sum()) < 98


def test_every_bit_of_a_value_survives() -> None:
    """NaN, negative zero and infinity are values too."""
    import torch

    a = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45] * 8)
    mixed = mixing.mix(a, a.clone(), 3)
    assert torch.equal(mixed.view(torch.int32), a.view(torch.int32))


def test_the_mix_follows_from_the_seed() -> None:
    import torch

    a, b = (torch.zeros(1000), {"x": torch.zeros(1000)}), (torch.ones(1000), {"x": torch.ones(1000)})
    first, again, other = (mixing.mix(a, b, seed) for seed in (1 << 62, 1 << 62, 2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1]["x"], again[1]["x"])
    assert not torch.equal(first[0], other[0])
    # Tensors of one value are mixed independently, else a sum of two inputs would take one of two values only.
    assert not torch.equal(first[0], first[1]["x"])


DIGEST = """
import hashlib, torch
from triton_sft_pipeline.verification.worker import mixing
a = tuple(torch.arange(n).to(t) for n, t in ((100_003, torch.float32), (4097, torch.bfloat16), (7, torch.int64)))
mixed = mixing.mix(a, tuple(-x for x in a), 123456789)
digest = hashlib.sha256(b"".join(bytes(x.view(torch.uint8).numpy()) for x in mixed)).hexdigest()
"""


def test_two_processes_make_the_same_mix_whatever_their_number_of_threads() -> None:
    other = f"import torch; torch.set_num_threads(1)\n{DIGEST}\nprint(digest)"
    found = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True).stdout
    here: dict[str, Any] = {}
    exec(DIGEST, here)
    assert found.strip() == here["digest"]


def strided(make: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Two draws, of zeros and of ones, through the same view."""
    import torch

    return make(torch.zeros(40, 60)), make(torch.ones(40, 60))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[3:, 5:50],
        lambda x: x.reshape(4, 10, 60).permute(2, 0, 1),
        lambda x: x.reshape(2, 5, 4, 60).to(memory_format=channels_last()),
    ],
    ids=["transposed", "every_other_column", "inner_window", "permuted", "channels_last"],
)
def test_tensors_that_are_not_contiguous_keep_their_strides(make: Callable[[Any], Any]) -> None:
    a, b = strided(make)
    mixed = mixing.mix(a, b, 5)
    assert (mixed.shape, mixed.stride()) == (a.shape, a.stride())
    assert set(mixed.flatten().tolist()) == {0.0, 1.0}
    # No larger than what it reads: the draw's own storage may be far larger.
    assert mixed.untyped_storage().nbytes() == mixing.nbytes(a)


def channels_last() -> Any:
    import torch

    return torch.channels_last


def test_draws_with_other_strides_are_mixed_all_the_same() -> None:
    import torch

    a, b = torch.zeros(30, 30), torch.ones(30, 30).t()
    assert set(mixing.mix(a, b, 5).flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    "make",
    [lambda x: x[0].expand(40, 60), lambda x: x.flatten().unfold(0, 8, 4)],
    ids=["expanded", "sliding_windows"],
)
def test_tensors_whose_elements_share_storage_are_taken_from_the_first_draw(make: Callable[[Any], Any]) -> None:
    a, b = strided(make)
    mixed = mixing.mix(a, b, 5)
    assert (mixed.shape, mixed.stride()) == (a.shape, a.stride())
    assert set(mixed.flatten().tolist()) == {0.0}
    assert mixed.untyped_storage().data_ptr() != a.untyped_storage().data_ptr()


def test_empty_tensors_and_single_numbers_are_mixed() -> None:
    import torch

    a, b = (torch.zeros(0, 3), torch.tensor(0.0)), (torch.ones(0, 3), torch.tensor(1.0))
    mixes = [mixing.mix(a, b, seed) for seed in range(20)]
    assert all(empty.shape == (0, 3) and number.shape == () for empty, number in mixes)
    assert {float(number) for _, number in mixes} == {0.0, 1.0}


def test_what_has_no_counterpart_is_taken_from_the_first_draw() -> None:
    import torch

    a = (3, "text", None, True, torch.zeros(50), torch.zeros(50), {"x": torch.zeros(50), "y": torch.zeros(50)}, (1,))
    b = (4, "other", 1, False, torch.ones(51), torch.ones(50).double(), {"x": torch.ones(50)}, (1, 2))
    mixed = mixing.mix(a, b, 1)
    assert mixed[:4] == (3, "text", None, True) and mixed[7] == (1,)
    assert [float(tensor.sum()) for tensor in (mixed[4], mixed[5], mixed[6]["y"])] == [0.0] * 3
    assert float(mixed[6]["x"].sum()) > 0


@pytest.mark.parametrize(
    "make", [lambda x: x, lambda x: x[:, ::2], lambda x: x[0].expand(40, 60)], ids=["dense", "gaps", "expanded"]
)
def test_refilling_gives_the_same_values_in_the_same_storage_whatever_was_written_there(
    make: Callable[[Any], Any],
) -> None:
    import torch

    a, b = strided(make)
    target = mixing.duplicate((a,))
    address = target[0].data_ptr()
    torch.as_strided(target[0], (target[0].untyped_storage().nbytes() // 4,), (1,)).fill_(float("nan"))
    mixing.refill(target, (a,), (b,), 9)
    expected = mixing.mix((a,), (b,), 9)
    assert target[0].data_ptr() == address and torch.equal(target[0], expected[0])
    whole = torch.as_strided(target[0], (target[0].untyped_storage().nbytes() // 4,), (1,))
    assert not whole.isnan().any()


def test_mixing_leaves_the_draws_alone_and_shares_no_storage_with_them() -> None:
    import torch

    a, b = torch.zeros(100), torch.ones(100)
    mixing.mix(a, b, 1).fill_(5)
    mixing.duplicate(a).fill_(5)
    assert (float(a.sum()), float(b.sum())) == (0.0, 100.0)


def test_a_view_has_the_storage_but_is_not_the_object() -> None:
    import torch

    base = (torch.zeros(4), {"x": torch.zeros(4)})
    views = mixing.views(base)
    views[0].fill_(1)
    views[0].t_().resize_(2)
    assert views[0] is not base[0] and base[0].tolist() == [1.0] * 4
    assert views[1]["x"].data_ptr() == base[1]["x"].data_ptr()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", FLOAT8])
def test_values_between_zero_and_one_become_about_half_negative(dtype: str) -> None:
    import torch

    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    shifted = mixing.shift((x, 1))
    assert shifted is not None and shifted[1] == 1 and shifted[0].dtype == x.dtype
    assert 400 < int((shifted[0].double() < 0).sum()) < 600
    assert float(x.double().min()) >= 0
    # Half of the range is a number that every one of these formats holds exactly.
    assert torch.equal(shifted[0], (x.float() - 0.5 if dtype == FLOAT8 else x - 0.5).to(x.dtype))


def test_a_narrow_range_far_from_zero_gets_both_signs() -> None:
    import torch

    shifted = mixing.shift((torch.linspace(1000.2, 1001.3, 50, dtype=torch.float64),))
    assert shifted is not None and 20 < int((shifted[0] < 0).sum()) < 30


def test_only_tensors_that_are_nowhere_negative_and_not_constant_are_shifted() -> None:
    import torch

    plain = {
        "negative": torch.tensor([-1.0, 2.0]),
        "constant": torch.ones(3),
        "int": torch.tensor([0, 5]),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 1j, 2]),
        "nan": torch.tensor([0.0, float("nan")]),
        "infinite": torch.tensor([0.0, float("inf")]),
        "empty": torch.zeros(0),
        "number": torch.tensor(2.0),
    }
    assert mixing.shift(plain) is None
    shifted = mixing.shift((plain, torch.tensor([0.0, 2.0])))
    assert shifted is not None and shifted[1].tolist() == [-1.0, 1.0]
    for name, tensor in plain.items():
        assert torch.equal(shifted[0][name].nan_to_num(7), tensor.nan_to_num(7)), name
        assert shifted[0][name].data_ptr() != tensor.data_ptr() or not tensor.numel(), name


def test_the_largest_and_the_smallest_numbers_can_be_shifted() -> None:
    import torch

    for values in ([1.0e308, 1.7e308], [0.0, 1e-323], [0.0, 1e-310]):
        shifted = mixing.shift(torch.tensor(values, dtype=torch.float64))
        assert shifted is not None and shifted.isfinite().all()


@pytest.mark.parametrize("make", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[0].expand(40, 60)])
def test_shifted_tensors_keep_their_strides(make: Callable[[Any], Any]) -> None:
    import torch

    x = make(torch.arange(2400.0).reshape(40, 60))
    shifted = mixing.shift(x)
    assert shifted is not None and shifted.stride() == x.stride()
    difference = x - shifted
    assert bool((difference == difference.flatten()[0]).all()) and shifted.min() < 0 < shifted.max()
