"""A fingerprint sees what a module computes and nothing of how it is written down."""

from __future__ import annotations

import pytest

from triton_sft_pipeline.problems import Problem, fingerprint, hash_problems

CODE = '''import torch
import torch.nn as nn
import torch.nn.functional as F

WIDTH = 4
batch_size = 16


def scaled(x, factor):
    return x * factor


class Block(nn.Module):
    def __init__(self, width=WIDTH):
        super(Block, self).__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return F.relu(scaled(self.norm(x), 2.0))


class Model(nn.Module):
    """Normalises."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the block."""
        # twice
        return self.block(self.block(x))


def get_inputs():
    return [torch.rand(batch_size, WIDTH)]


def get_init_inputs():
    return []
'''

SAME = {
    "a comment": ("# twice", "# two times"),
    "a docstring": ('"""Normalises."""', '"""Says something else."""'),
    "no docstring": ('        """Applies the block."""\n', ""),
    "formatting": ("scaled(self.norm(x), 2.0)", "scaled(\n            self.norm(x),\n            2.0,\n        )"),
    "blank lines": ("\n\n\n", "\n"),
    "a class name": ("Model", "LayerNormTwice"),
    "a helper's class name": ("Block", "Inner"),
    "the old spelling of super": ("super().__init__()", "super(Model, self).__init__()"),
    "annotations": ("x: torch.Tensor) -> torch.Tensor", "x)"),
    "an annotated assignment": ("WIDTH = 4", "WIDTH: int = 4"),
    "an import's name": ("F.relu", "torch.nn.functional.relu"),
    "where a name is imported from": ("import torch.nn as nn", "from torch import nn"),
    "an import that nothing uses": ("import torch\n", "import torch\nimport math\n"),
    "the inputs": ("torch.rand(batch_size, WIDTH)", "torch.randn(7, WIDTH, WIDTH)"),
    "a number that only the inputs use": ("batch_size = 16", "batch_size = 2048"),
    "the init inputs": ("return []", "return [[], {}]"),
    "a script part": ("def get_init_inputs", "if __name__ == '__main__':\n    print(Model())\n\n\ndef get_init_inputs"),
}


@pytest.mark.parametrize("change", SAME)
def test_what_does_not_change_the_computation_does_not_change_the_fingerprint(change: str) -> None:
    old, new = SAME[change]
    assert old in CODE
    assert fingerprint(CODE.replace(old, new)) == fingerprint(CODE)


DIFFERENT = {
    "an operator": ("x * factor", "x + factor"),
    "a constant": ("2.0", "3.0"),
    "an integer that becomes a float": ("2.0", "2"),
    "a function": ("F.relu", "F.gelu"),
    "a layer": ("nn.LayerNorm", "nn.BatchNorm1d"),
    "a default": ("WIDTH = 4", "WIDTH = 8"),
    "how often": ("self.block(self.block(x))", "self.block(x)"),
    "a base class": ("class Block(nn.Module)", "class Block(nn.Sequential)"),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_what_changes_the_computation_changes_the_fingerprint(change: str) -> None:
    old, new = DIFFERENT[change]
    assert old in CODE
    assert fingerprint(CODE.replace(old, new)) != fingerprint(CODE)


def test_text_that_does_not_parse_is_told_apart_but_for_white_space() -> None:
    assert fingerprint("class Model(  :\n  pass") == fingerprint("class Model( :\npass")
    assert fingerprint("class Model(") != fingerprint("class Other(")


@pytest.mark.parametrize("text", ["", "x = '\ud800'", "x = '\0'", "(" * 10_000, "-" * 100_000 + "1"])
def test_every_text_has_a_fingerprint(text: str) -> None:
    assert len(fingerprint(text)) == 64


def test_a_fingerprint_is_the_same_in_every_version_of_python() -> None:
    # Datasets that were made by one version are compared by another; a change of this value makes all of them stale.
    code = "import torch.nn as nn\nclass M(nn.Module):\n    def forward(self, x):\n        return x + 1\n"
    assert fingerprint(code) == "59f368dc89178e1580b14346014afb290714d3e4f6fb44365a735c4fb9558c3d"


def test_the_hash_of_problems_covers_keys_and_code_and_not_their_order() -> None:
    first, second = Problem("a", CODE), Problem("b", CODE)
    assert hash_problems([first, second]) == hash_problems([second, first])
    others = ([first], [first, Problem("c", CODE)], [first, Problem("b", CODE.replace("torch.rand(", "torch.randn("))])
    assert hash_problems([first, second]) not in {hash_problems(other) for other in others}
