"""Which modules touch a held-out problem, and which only look like it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from triton_sft_pipeline.problems import Problem, load_problems
from triton_sft_pipeline.problems.likeness import Contact, HeldOut

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "held_out"
REAL = os.environ.get("TRITON_SFT_REAL_TRACES")

SOFTSIGN = """import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return x / (1.0 + torch.abs(x))


def get_inputs():
    return [torch.randn(32, 1024)]
"""

# The same under other names, written out step by step and as methods.
SOFTSIGN_IN_DISGUISE = '''
from torch import nn, Tensor


class Squash(nn.Module):
    """Keeps its input between -1 and 1."""

    def __init__(self):
        super(Squash, self).__init__()

    def forward(self, inputs: Tensor) -> Tensor:
        size = inputs.abs()  # never negative
        bottom = 1.0 + size
        return inputs / bottom
'''

NORMS = """import torch
import torch.nn as nn


class Norm(nn.Module):
    def __init__(self, features, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        var = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * (x - mean) / torch.sqrt(var + self.eps)
"""


def held_out(*codes: str, overlap: float = 0.8) -> HeldOut:
    return HeldOut([Problem(key=f"problem_{n}", pytorch_code=code) for n, code in enumerate(codes)], overlap)


def changed(code: str, old: str, new: str) -> str:
    assert old in code
    return code.replace(old, new)


def test_every_shipped_held_out_problem_is_found_and_touches_no_other() -> None:
    problems = load_problems(SHIPPED)
    assert len(problems) >= 10
    index = HeldOut(problems)
    for problem in problems:
        assert index.touched_by(problem.pytorch_code) == Contact(problem.key, "fingerprint", 1.0)
        others = HeldOut([other for other in problems if other is not problem], overlap=0.6)
        assert others.touched_by(problem.pytorch_code) is None


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.py")), ids=lambda file: file.stem)
def test_a_renamed_copy_of_a_held_out_problem_is_found(file: Path) -> None:
    code = file.read_text(encoding="utf-8")
    own = {"x": "tensor_in", "y": "target", "mask": "allowed", "weight": "gain", "scale": "gain", "bias": "offset"}
    renamed = re.sub(r"\b(x|y|mask|weight|scale|bias)\b(?!=)", lambda found: own[found[0]], code)
    renamed = changed(renamed, "class Model(", "# Seen somewhere.\nclass Copied(")
    contact = HeldOut(load_problems(SHIPPED)).touched_by(renamed)
    # The name of a module's only input is nothing to a fingerprint already.
    assert contact is not None and contact.name == file.stem and contact.how in ("fingerprint", "normal_form")


def test_a_copy_in_disguise_is_the_same_module_but_for_names() -> None:
    contact = held_out(SOFTSIGN).touched_by(SOFTSIGN_IN_DISGUISE)
    assert contact == Contact("problem_0", "normal_form", 1.0)
    assert str(contact) == "the same module as the held-out problem problem_0, but for names and layout"


def test_a_copy_inside_something_larger_is_found_by_its_n_grams() -> None:
    larger = SOFTSIGN_IN_DISGUISE + "\n\nclass Net(nn.Module):\n    def __init__(self, size):\n"
    larger += "        super().__init__()\n        self.linear = nn.Linear(size, size)\n        self.act = Squash()\n\n"
    larger += "    def forward(self, x):\n        return self.act(self.linear(x))\n"
    contact = held_out(SOFTSIGN).touched_by(larger)
    assert contact == Contact("problem_0", "overlap", 1.0)
    assert str(contact) == "holds 100% of the held-out problem problem_0"


def test_a_changed_constant_in_a_long_module_is_nearly_the_same_and_in_a_short_one_is_not() -> None:
    contact = held_out(NORMS).touched_by(changed(NORMS, "eps=1e-6", "eps=1e-3"))
    assert contact is not None and contact.how == "overlap" and 0.9 < contact.overlap < 1.0
    assert held_out(SOFTSIGN).touched_by(changed(SOFTSIGN, "1.0 +", "0.3 +")) is None


@pytest.mark.parametrize(
    "forward",
    [
        "return x",
        "return torch.abs(x)",
        "return x / torch.sqrt(1.0 + x * x)",
        "return torch.tanh(x)",
        "return x * torch.sigmoid(x)",
        "return torch.relu(x) + 1.0",
    ],
)
def test_what_only_looks_like_a_held_out_problem_is_kept(forward: str) -> None:
    code = changed(SOFTSIGN, "return x / (1.0 + torch.abs(x))", forward)
    assert held_out(SOFTSIGN).touched_by(code) is None
    assert HeldOut(load_problems(SHIPPED)).touched_by(code) is None


def test_the_share_asked_for_decides_and_the_nearest_is_named() -> None:
    edited = changed(
        NORMS, "        return self.weight * (x - mean)", "        x = x - mean\n        return self.weight * x"
    )
    for overlap, found in ((0.5, True), (0.99, False)):
        assert (held_out(NORMS, overlap=overlap).touched_by(edited) is not None) == found
    both = held_out(NORMS, changed(NORMS, "eps=1e-6", "eps=0.5"), overlap=0.5)
    contact = both.touched_by(changed(edited, "eps=1e-6", "eps=0.5"))
    assert contact is not None and contact.name == "problem_1"


def test_a_module_that_computes_nothing_touches_only_itself() -> None:
    nothing = changed(SOFTSIGN, "x / (1.0 + torch.abs(x))", "x")
    index = held_out(nothing)
    assert index.touched_by(nothing) == Contact("problem_0", "fingerprint", 1.0)
    assert index.touched_by(SOFTSIGN) is None


def test_what_every_module_has_does_not_make_two_alike() -> None:
    pooling = changed(SOFTSIGN, "x / (1.0 + torch.abs(x))", "torch.max_pool2d(x, 2)")
    other = changed(SOFTSIGN, "x / (1.0 + torch.abs(x))", "torch.max_pool1d(x, 2)")
    assert held_out(pooling, overlap=0.5).touched_by(other) is None


def test_code_that_does_not_parse_is_compared_by_its_words() -> None:
    broken = changed(NORMS, "def forward(self, x):", "def forward(self, x:")
    assert held_out(NORMS).touched_by(broken) is None
    assert held_out(broken).touched_by(changed(broken, "    return", "\n    return  # here")) is not None
    assert held_out(SOFTSIGN).touched_by("") is None


@pytest.mark.skipif(not REAL, reason="TRITON_SFT_REAL_TRACES names no folder of real traces")
def test_no_real_trace_touches_the_shipped_problems_and_two_spellings_of_gelu_touch_each_other() -> None:
    records = json.loads((Path(REAL or "") / "gpt_oss_120b_single_turn.json").read_text(encoding="utf-8"))
    shipped = HeldOut(load_problems(SHIPPED))
    assert not [r["sample_key"] for r in records if shipped.touched_by(r["pytorch_code"])]
    by_name = {r["sample_key"]: r["pytorch_code"] for r in records}
    gelu = HeldOut(
        [Problem(key="kernelbench", pytorch_code=next(c for c in by_name.values() if "GELU activation" in c))]
    )
    touching = {name: str(c.how) for name, code in by_name.items() if (c := gelu.touched_by(code))}
    assert list(touching.values()) == ["fingerprint", "fingerprint"]


def test_all_the_problems_that_a_module_touches_are_named_once_with_the_nearest_way() -> None:
    near = changed(NORMS, "eps=1e-6", "eps=1e-3")
    index = held_out(NORMS, near, NORMS, SOFTSIGN)
    touched = index.all_touched_by(NORMS)
    assert [(c.name, c.how) for c in touched] == [
        ("problem_0", "fingerprint"),
        ("problem_1", "overlap"),
        ("problem_2", "fingerprint"),
    ]
    assert 0.9 < touched[1].overlap < 1.0
    assert [(c.name, c.how) for c in index.all_touched_by(SOFTSIGN_IN_DISGUISE)] == [("problem_3", "normal_form")]
    assert index.all_touched_by(changed(SOFTSIGN, "1.0 +", "0.3 +")) == []
