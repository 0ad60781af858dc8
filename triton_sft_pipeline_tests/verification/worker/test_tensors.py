"""Tensors come out of the wire as they went in: every dtype and shape, with the strides that matter."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest

from triton_sft_pipeline.verification.wire import ITEM_SIZE, Array
from triton_sft_pipeline.verification.worker import tensors
from triton_sft_pipeline.verification.worker.tensors import UnsupportedValueError

torch = pytest.importorskip("torch")
WAYS = [tensors.to_wire, tensors.to_wire_strided]


def bits(tensor: Any) -> list[int]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return list(flat.tolist())


def random_bits(dtype: str, *shape: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    size = math.prod(shape) * ITEM_SIZE[dtype]
    flat = torch.randint(0, 2 if dtype == "bool" else 256, (size,), dtype=torch.uint8, generator=generator)
    return flat.view(getattr(torch, dtype)).reshape(shape)


@pytest.mark.parametrize("to_wire", WAYS)
@pytest.mark.parametrize("dtype", [name for name in ITEM_SIZE if hasattr(torch, name)])
def test_every_dtype_keeps_its_bits(dtype: str, to_wire: Any) -> None:
    tensor = random_bits(dtype, 3, 4)
    array = to_wire(tensor)
    back = tensors.from_wire(array, "cpu")
    assert (array.dtype, array.shape, array.stride) == (dtype, (3, 4), None)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits(back) == bits(tensor)


@pytest.mark.parametrize("to_wire", WAYS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1)], ids=str)
def test_a_scalar_and_an_empty_tensor_keep_their_shapes(shape: tuple[int, ...], to_wire: Any) -> None:
    back = tensors.from_wire(to_wire(torch.full(shape, 7.0)), "cpu")
    assert back.shape == shape and back.dtype == torch.float32
    assert torch.equal(back, torch.full(shape, 7.0))


base = torch.arange(24.0)
VIEWS = {
    "transposed": base.reshape(4, 6).t(),
    "channels last": base.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "every second": base[::2],
    "a middle part": base.reshape(4, 6)[1:3, 1:4],
    "expanded": base[:3].reshape(3, 1).expand(3, 5),
    "one element, expanded": torch.tensor(2.0).expand(4, 4),
    "overlapping": base.as_strided((4, 3), (2, 1)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_inputs_keep_strides_and_do_not_bring_more_than_they_span(name: str) -> None:
    view = VIEWS[name]
    array: Any = tensors.to_wire_strided(view)
    back = tensors.from_wire(array, "cpu")
    assert (back.shape, back.stride()) == (view.shape, view.stride())
    assert torch.equal(back, view)
    assert back.storage_offset() == 0
    span = 1 + sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
    assert len(array.data) == span * 4 == back.untyped_storage().nbytes()


@pytest.mark.parametrize("name", VIEWS)
def test_answers_are_dense(name: str) -> None:
    array: Any = tensors.to_wire(VIEWS[name])
    assert array.stride is None and len(array.data) == VIEWS[name].numel() * 4
    assert torch.equal(tensors.from_wire(array, "cpu"), VIEWS[name])


def test_a_small_view_of_a_large_storage_travels_without_the_gaps() -> None:
    column = torch.arange(1000.0).reshape(100, 10)[:, 3]
    array: Any = tensors.to_wire_strided(column)
    assert array.stride is None and len(array.data) == 400
    assert torch.equal(tensors.from_wire(array, "cpu"), column)


def test_lazy_conjugates_and_negatives_are_carried_out() -> None:
    number = torch.tensor([1.0 + 2.0j, -3.0 + 4.0j])
    for lazy in (number.conj(), number.conj().imag):
        for to_wire in WAYS:
            assert torch.equal(tensors.from_wire(to_wire(lazy), "cpu"), lazy)


def test_nested_values_keep_their_structure_and_lists_become_tuples() -> None:
    tensor = torch.tensor([1.0, math.nan])
    value = [tensor, {"a": (1, True, None), 2: "text"}, OrderedDict(b=[tensor]), 0.5]
    back = tensors.from_wire(tensors.to_wire(value), "cpu")
    assert type(back) is tuple and len(back) == 4
    assert back[1] == {"a": (1, True, None), 2: "text"} and back[3] == 0.5
    assert type(back[2]["b"]) is tuple
    assert [bits(leaf) for leaf in tensors.tensors_in(back)] == [bits(tensor)] * 2


class Pair(NamedTuple):
    left: Any
    right: int


def test_a_named_tuple_is_a_tuple_and_a_parameter_a_tensor() -> None:
    pair = Pair(torch.nn.Parameter(torch.ones(2)), 3)
    back = tensors.from_wire(tensors.to_wire(pair), "cpu")
    assert type(back) is tuple and back[1] == 3
    assert type(back[0]) is torch.Tensor and not back[0].requires_grad


class Subclass(torch.Tensor):  # type: ignore[name-defined,misc]
    pass


UNSUPPORTED = {
    "a sparse tensor": (torch.eye(2).to_sparse(), "sparse"),
    "a quantised tensor": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "qint8"),
    "a subclass": (torch.ones(2).as_subclass(Subclass), "subclass Subclass"),
    "an object": (object(), "type object"),
    "a set": ({1}, "type set"),
    "bytes": (b"x", "type bytes"),
    "a dictionary with other keys": ({(1, 2): 3}, "type dict"),
    "deep inside": ([{"a": (object(),)}], "type object"),
    "a subclass of int": (type("Whole", (int,), {})(1), "type Whole"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_cannot_travel_is_refused_by_name(name: str) -> None:
    value, mentioned = UNSUPPORTED[name]
    for convert in (*WAYS, tensors.clone):
        with pytest.raises(UnsupportedValueError, match=mentioned):
            convert(value)


@pytest.mark.parametrize("name", VIEWS)
def test_a_clone_keeps_strides_and_shares_nothing(name: str) -> None:
    view = VIEWS[name].clone() if name == "transposed" else VIEWS[name]
    (clone,) = tensors.clone((view,))
    assert (clone.shape, clone.stride()) == (view.shape, view.stride())
    assert torch.equal(clone, view)
    assert clone.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()


def test_what_came_from_the_wire_does_not_share_its_memory() -> None:
    data = bytearray(torch.ones(2).numpy().tobytes())
    back = tensors.from_wire(Array("float32", (2,), memoryview(data)), "cpu")
    back.zero_()
    assert bytes(data) == torch.ones(2).numpy().tobytes()


def test_bytes_are_counted_by_elements() -> None:
    assert tensors.nbytes((torch.ones(3), {"a": torch.ones(2, dtype=torch.float64)}, 5)) == 12 + 16
