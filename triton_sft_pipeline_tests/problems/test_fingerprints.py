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


PLAIN = """import torch
from torch import nn

class Model(nn.Module):
    INIT
    def forward(self, x):
        return torch.sigmoid(x)
"""
SAYS_SO = "def __init__(self):\n        super().__init__()\n"


@pytest.mark.parametrize(
    "init",
    [
        "",
        SAYS_SO.replace("super()", "super(Model, self)"),
        SAYS_SO.replace("(self)", "(self) -> None"),
        SAYS_SO.replace(":\n", ':\n        """Nothing to set up."""\n'),
    ],
)
def test_an_init_that_only_calls_its_bases_does_not_change_the_fingerprint(init: str) -> None:
    assert fingerprint(PLAIN.replace("INIT", init)) == fingerprint(PLAIN.replace("INIT", SAYS_SO))


def test_a_plain_init_may_stand_after_what_it_makes_no_difference_to() -> None:
    after = PLAIN.replace("    INIT\n", "") + f"\n    {SAYS_SO}"
    assert fingerprint(after) == fingerprint(PLAIN.replace("INIT", SAYS_SO))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("        super().__init__()\n", "        super().__init__()\n        self.scale = 2\n"),
        ("(self):\n        super", "(self, width):\n        super"),
        ("(self):\n        super", "(self, width=4):\n        super"),
        ("super().__init__()", "super().__init__(4)"),
        ("super().__init__()", "pass"),
    ],
)
def test_an_init_that_does_more_changes_the_fingerprint(old: str, new: str) -> None:
    assert old in SAYS_SO
    plain, more = (fingerprint(PLAIN.replace("INIT", init)) for init in (SAYS_SO, SAYS_SO.replace(old, new)))
    assert plain != more


def test_what_another_base_sets_up_is_not_guessed() -> None:
    child = PLAIN.replace("nn.Module", "nn.Sequential")
    assert fingerprint(child.replace("INIT", "")) != fingerprint(child.replace("INIT", SAYS_SO))


INPUT = """import torch
from torch import nn

class Model(nn.Module):
    def forward(self, x):
        y = x.flatten(1)
        return torch.stack([(lambda z: z + x)(row) for row in y]) - y
"""


def test_the_name_of_the_only_input_does_not_change_the_fingerprint() -> None:
    assert fingerprint(INPUT.replace("x)", "input)").replace("x.", "input.")) == fingerprint(INPUT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def forward(self, a, x): return a - x", "def forward(self, x, a): return a - x"),
        ("def forward(self, a): return a - x", "def forward(self, x): return x - x"),
        ("def forward(self, a): x = a + 1; return a * x", "def forward(self, x): x = x + 1; return x * x"),
        ("def forward(self, a=1): return a", "def forward(self, x=1): return x"),
        ("def other(self, a): return a", "def other(self, x): return x"),
    ],
)
def test_an_input_is_not_called_what_something_else_is_called(one: str, other: str) -> None:
    start = INPUT[: INPUT.index("def forward")]
    assert fingerprint(f"{start}{one}\n") != fingerprint(f"{start}{other}\n")


def test_the_two_gelus_of_the_usual_problem_sets_are_one_problem() -> None:
    kernelbook = """import torch.nn as nn
import torch.nn.functional as F
import torch.optim

class GELU(nn.Module):
    \"\"\"Applies the Gaussian error linear unit.\"\"\"

    def forward(self, input):
        return F.gelu(input)

def get_inputs():
    return [torch.rand([4, 4, 4, 4])]
"""
    kernelbench = """import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self):
        super(Model, self).__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x)

batch_size = 4096

def get_inputs():
    return [torch.rand(batch_size, 393216)]
"""
    assert fingerprint(kernelbook) == fingerprint(kernelbench)
