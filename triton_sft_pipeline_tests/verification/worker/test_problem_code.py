"""A problem's code is understood as its author meant it."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from triton_sft_pipeline.verification.worker import problem_code
from triton_sft_pipeline.verification.worker.loading import load_code
from triton_sft_pipeline.verification.worker.problem_code import (
    ReferenceFailure,
    are_inputs_large,
    build_module,
    describe_state,
    draw_elsewhere,
    draw_inputs,
    init_arguments,
    instantiate,
    module_classes,
    refuse_huge_inputs,
    runs_code_when_loaded,
)

torch = pytest.importorskip("torch")
HEAD = "import torch\nimport torch.nn as nn\n\n"


def giving(inputs: Any) -> Any:
    return SimpleNamespace(get_inputs=lambda: inputs)


def loaded(tmp_path: Path, body: str) -> tuple[Path, Any]:
    file = tmp_path / "problem.py"
    file.write_text(HEAD + textwrap.dedent(body))
    return file, load_code(file, f"problem_{tmp_path.name}")


def test_every_draw_is_another() -> None:
    code = SimpleNamespace(get_inputs=lambda: [torch.rand(4), [torch.rand(2)], 3])
    draws = draw_inputs(code, 4)  # type: ignore[arg-type]
    assert len({tuple(draw[0].tolist()) for draw in draws}) == 4
    assert all(type(draw) is tuple and type(draw[1]) is tuple and draw[2] == 3 for draw in draws)


def test_numpy_and_random_are_seeded_as_well() -> None:
    import random

    import numpy as np

    code = SimpleNamespace(get_inputs=lambda: (np.random.rand(), random.random()))
    numpys, randoms = zip(*draw_inputs(code, 3), strict=True)  # type: ignore[arg-type]
    assert len(set(numpys)) == len(set(randoms)) == 3


def test_gigantic_inputs_are_drawn_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = giving([torch.zeros(100)])
    for room, draws in ((400, 1), (1200, 3), (10, 1), (10**6, 5)):
        monkeypatch.setattr(problem_code, "_MAX_INPUT_BYTES", room)
        assert len(draw_inputs(inputs, 5)) == draws


@pytest.mark.parametrize(
    ("inputs", "mentioned"),
    [(torch.ones(2), "a Tensor; it must return a list"), (None, "NoneType"), ([object()], "cannot be passed on")],
    ids=["a tensor", "nothing", "an object"],
)
def test_inputs_that_are_none_are_refused(inputs: Any, mentioned: str) -> None:
    with pytest.raises(ReferenceFailure, match=mentioned) as caught:
        draw_inputs(giving(inputs), 1)
    assert caught.value.finding.verdict == "reference_error"


def test_inputs_too_large_for_the_interpreter_are_never_allocated() -> None:
    code = SimpleNamespace(get_inputs=lambda: [torch.rand(1 << 20, 1 << 20)])
    with pytest.raises(ReferenceFailure, match=r"1\.1e\+12 elements") as caught:
        refuse_huge_inputs(code)  # type: ignore[arg-type]
    assert caught.value.finding.verdict == "unsupported_on_cpu"
    refuse_huge_inputs(giving([torch.ones(2)]))
    # Values are needed, so nothing is known.
    refuse_huge_inputs(SimpleNamespace(get_inputs=lambda: [torch.ones(int(torch.ones(1)))]))  # type: ignore[arg-type]


def test_model_is_the_module_under_test_else_any_of_the_files_own(tmp_path: Path) -> None:
    lines = ["from torch.nn import Linear", "class First(nn.Module): pass", "class Config: pass"]
    lines += ["class Second(First): pass", "class Inherited(Linear): pass"]
    file, code = loaded(tmp_path, "\n".join(lines))
    assert module_classes(file, code) == ["Inherited", "Second", "First"]
    (tmp_path / "other").mkdir()
    file, code = loaded(tmp_path / "other", "\n".join([*lines, "class Model(First): pass", "class Third(First): pass"]))
    assert module_classes(file, code) == ["Model"]


def test_a_file_without_a_module_is_refused(tmp_path: Path) -> None:
    file, code = loaded(tmp_path, "class Config: pass\nfrom torch.nn import Linear\n")
    with pytest.raises(ReferenceFailure, match=r"no nn\.Module"):
        module_classes(file, code)


def test_the_first_class_that_can_be_built_and_called_is_used_in_a_fresh_state(tmp_path: Path) -> None:
    _, code = loaded(
        tmp_path,
        """
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("calls", torch.zeros(1))
            def forward(self, x):
                self.calls += 1
                return x
        class Other(Counting):
            def __init__(self, size):
                super().__init__()
        class Picky(Counting):
            def forward(self, x, y):
                return x
        """,
    )
    module, name = build_module(code, ["Other", "Picky", "Counting"], lambda: (torch.ones(2),), "cpu")
    assert name == "Counting" and type(module).__name__ == "Counting"
    assert float(module.calls) == 0.0 and not module.training
    with pytest.raises(TypeError, match="size"):
        build_module(code, ["Other", "Picky"], lambda: (torch.ones(2),), "cpu")
    with pytest.raises(TypeError, match="size"):
        build_module(code, ["Other"], lambda: (torch.ones(2),), "cpu")


def test_every_instance_has_the_same_weights_whatever_was_drawn_before(tmp_path: Path) -> None:
    _, code = loaded(tmp_path, "class Model(nn.Linear):\n    def __init__(self):\n        super().__init__(3, 3)\n")
    first = instantiate(code, "Model", "cpu")
    torch.rand(5)
    assert torch.equal(first.weight, instantiate(code, "Model", "cpu").weight)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ([], {})),
        ([3, 4], ([3, 4], {})),
        ([[3], {"bias": False}], ([3], {"bias": False})),
        ([(), {}], ([], {})),
        ([[3], [4]], ([[3], [4]], {})),
        ([{"a": 1}, {"b": 2}], ([{"a": 1}, {"b": 2}], {})),
    ],
    ids=str,
)
def test_both_ways_of_giving_arguments_are_understood(given: Any, expected: Any) -> None:
    assert init_arguments(SimpleNamespace(get_init_inputs=lambda: given)) == expected  # type: ignore[arg-type]
    assert init_arguments(SimpleNamespace()) == ([], {})  # type: ignore[arg-type]


class Net(torch.nn.Module):  # type: ignore[name-defined,misc]
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(2, 3)
        self.tied = torch.nn.Linear(2, 3, bias=False)
        self.tied.weight = self.fc.weight
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.plain = torch.ones(4)

    def forward(self, x: Any, scale: float = 1.0, *more: Any, flag: bool = False) -> Any:
        return x


def test_everything_that_a_wrapper_may_be_given_is_described() -> None:
    module = Net().eval()
    found = describe_state(SimpleNamespace(get_init_inputs=lambda: [2, "text"]), module, 1)  # type: ignore[arg-type]
    available = found["available"]
    assert available["input_names"] == ("x", "scale") and available["input_count"] == 1
    assert available["parameters"] == ("fc.weight", "fc.bias", "norm.weight", "norm.bias")
    assert available["buffers"] == ("hidden", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert available["module_weights"] == ("fc.weight", "fc.bias", "tied.weight", "norm.weight", "norm.bias")
    state = found["state"]
    assert state["state_dict"] == tuple(module.state_dict()) and "hidden" not in state["state_dict"]
    assert set(state["tensors"]) == {*state["state_dict"], "hidden"}
    assert found["init_inputs"] == ((2, "text"), {})


def test_what_is_described_is_a_copy_and_what_cannot_travel_is_left_out() -> None:
    module = Net()
    found = describe_state(SimpleNamespace(get_init_inputs=lambda: [object()]), module, 1)  # type: ignore[arg-type]
    before = bytes(found["state"]["tensors"]["fc.weight"].data)
    with torch.no_grad():
        module.fc.weight.zero_()
    assert found["init_inputs"] is None
    assert bytes(found["state"]["tensors"]["fc.weight"].data) == before != bytes(len(before))


@pytest.mark.parametrize(
    ("line", "runs"),
    [
        ("import os", False),
        ("from os import path", False),
        ("'''Documentation.'''", False),
        ("SIZE: int = 3", False),
        ("A = B = 3", False),
        ("def f():\n    print()", False),
        ("class C:\n    pass", False),
        ("print()", True),
        ("os.environ = {}", True),
        ("x[0] = 1", True),
        ("x += 1", True),
        ("if True:\n    pass", True),
        ("with open('f'):\n    pass", True),
    ],
)
def test_code_that_does_more_than_define_is_seen(line: str, runs: bool) -> None:
    assert runs_code_when_loaded(f"import torch\n{line}\n") is runs


LARGE = {
    "numbers": ("n = 4096\ndef get_inputs():\n    return [torch.rand(n, 393216)]", True),
    "a shift": ("def get_inputs():\n    return [torch.rand(1 << 28)]", True),
    "a power": ("def get_inputs():\n    return [torch.rand(2**28)]", True),
    "numbers that are no shape": ("n = 10**12\ndef get_inputs():\n    return [torch.rand(8)]", False),
    "small numbers": ("def get_inputs():\n    return [torch.rand(4, 4, 4, 4)]", False),
    "values are needed": ("def get_inputs():\n    return [torch.rand(int(torch.ones(1)) << 28)]", False),
    "it cannot be loaded apart": ("torch.manual_seed(0)\ndef get_inputs():\n    return [torch.rand(1 << 28)]", False),
    "it fails": ("def get_inputs():\n    return 1 / 0 ** 3", False),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_inputs_are_known_before_they_are_drawn(tmp_path: Path, name: str) -> None:
    body, expected = LARGE[name]
    file = tmp_path / "problem.py"
    file.write_text(HEAD + body)
    assert are_inputs_large(file, HEAD + body) is expected
    assert "apart" not in sys.modules


def test_inputs_are_drawn_where_they_are_asked_for(tmp_path: Path) -> None:
    body = "def get_inputs():\n    return [torch.rand(3), torch.arange(3), torch.rand(2, device='cpu'), 5]"
    file, _ = loaded(tmp_path, body)
    draws = draw_elsewhere(file, HEAD + body, 2, "meta")
    assert draws is not None and len(draws) == 2
    assert [tensor.device.type for tensor in draws[0][:3]] == ["meta"] * 3 and draws[0][3] == 5
    drawn = draw_elsewhere(file, HEAD + body, 2, "cpu")
    assert drawn is not None and drawn[0][0].tolist() != drawn[1][0].tolist()


def test_what_cannot_be_drawn_elsewhere_is_left_to_where_it_can(tmp_path: Path) -> None:
    body = """
        made = []
        def get_inputs():
            made.append(torch.rand(3))
            return [made[0] + torch.rand(3, device="cpu")]
    """
    file, code = loaded(tmp_path, body)
    assert draw_elsewhere(file, HEAD + textwrap.dedent(body), 1, "meta") is None
    # And nothing of the attempt is left in the module under test.
    assert code.made == [] and draw_inputs(code, 1)[0][0].device.type == "cpu"
    named = (
        "lib = torch.library.Library('test_problem_code_once', 'DEF')\ndef get_inputs():\n    return [torch.rand(3)]"
    )
    (tmp_path / "named").mkdir()
    file, code = loaded(tmp_path / "named", named)
    assert draw_elsewhere(file, HEAD + named, 1, "meta") is None and len(draw_inputs(code, 1)) == 1
