"""A module belongs to the family of its heaviest operator, and few belong to none."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from triton_sft_pipeline.problems import FAMILIES, family_of, load_problems
from triton_sft_pipeline_tests.problems.codes import module

DATA = Path(__file__).resolve().parents[2] / "data"
REAL = os.environ.get("TRITON_SFT_REAL_TRACES")


@pytest.mark.parametrize(
    ("family", "forward", "init"),
    [
        ("matrix product", "return x @ y", ""),
        ("matrix product", "return torch.softmax(self.fc(x), dim=1)", "self.fc = nn.Linear(4, 4)"),
        ("matrix product", "return self.net(x)", "self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())"),
        ("convolution", "return self.fc(self.conv(x))", "self.conv = nn.Conv2d(3, 3, 1)\nself.fc = nn.Linear(4, 4)"),
        ("recurrent network", "return self.fc(self.rnn(x)[0])", "self.rnn = nn.LSTM(4, 4)\nself.fc = nn.Linear(4, 4)"),
        ("attention", "return F.scaled_dot_product_attention(x, y, y) @ x", ""),
        ("softmax", "return torch.softmax(x.sum(0), dim=-1)", ""),
        ("pooling", "return F.relu(F.max_pool2d(x, 2))", ""),
        ("normalisation", "return self.norm(x)", "self.norm = nn.BatchNorm2d(3)"),
        ("normalisation", "return self.a(self.a(F.max_pool2d(x, 2)))", "self.a = nn.BatchNorm2d(3)"),
        ("loss", "return F.mse_loss(x, y)", ""),
        ("scan or sort", "return torch.cumsum(x, dim=1)", ""),
        ("reduction", "return x.mean(dim=1)", ""),
        ("reduction", "return torch.max(x, 1)[0]", ""),
        ("reduction", "return x.min(self.dim)[0]", ""),
        ("reduction", "return x.max()", ""),
        ("reduction", "return x.amax(-1) + 1", ""),
        ("reduction", "return x / x.norm(p=1, dim=1, keepdim=True)", ""),
        ("element-wise", "return torch.max(x, y)", ""),
        ("element-wise", "return x.min(other=y)", ""),
        ("element-wise", "return F.relu(x)", ""),
        ("element-wise", "return x + y", ""),
        ("element-wise", "x *= 2\nreturn x", ""),
        ("element-wise", "return -x", ""),
        ("element-wise", "return self.act(x)", "self.act = nn.GELU()"),
        ("element-wise", "return x.clamp_(0, 1)", ""),
        ("element-wise", "return x * max(1, self.dim)", ""),
        ("element-wise", "return x * sum([1, 2])", ""),
        ("other", "return x", ""),
        ("other", "return torch.cat([x, y], 1)", ""),
        ("other", "return x.view(x.size(0) // 2, x.size(1) * 2)", ""),
        ("other", "return x[:, : self.dim + 1]", ""),
        ("other", "return self.table(x)", "self.table = nn.Embedding(4, 4)\nself.scale = 4 ** -0.5"),
        ("other", "assert x.dim() == 2\nif x.size(0) > 1:\n    return y\nreturn x", ""),
    ],
)
def test_the_heaviest_operator_gives_the_family(family: str, forward: str, init: str) -> None:
    assert family in FAMILIES
    assert family_of(module(forward, init)) == family


def test_a_layer_that_is_derived_from_does_its_bases_work() -> None:
    code = "class Causal(nn.Conv1d):\n    def forward(self, x):\n        return super().forward(x)\n"
    assert family_of(f"import torch.nn as nn\n{code}") == "convolution"


@pytest.mark.parametrize("text", ["", "class Model(", "x = '\0'", "-" * 200_000 + "1", "x = '\ud800'"])
def test_every_text_has_a_family(text: str) -> None:
    assert family_of(text) == "other"


def test_the_shipped_problems_are_of_the_families_that_their_names_say() -> None:
    assert {p.key: family_of(p.pytorch_code) for p in load_problems(DATA / "held_out")} == {
        "01_hardtanh_shift": "element-wise",
        "02_softsign": "element-wise",
        "03_row_range": "reduction",
        "04_mean_abs_norm": "reduction",
        "05_causal_softmax": "softmax",
        "06_gram_matrix": "matrix product",
        "07_max_pool2d": "pooling",
        "08_hinge_loss": "reduction",
        "09_scale_shift_relu": "element-wise",
        "10_subtract_l1_norm": "reduction",
    }


def test_the_modules_of_the_sample_traces_all_have_a_family() -> None:
    records = json.loads((DATA / "reasoning_traces.json").read_text(encoding="utf-8"))
    counts = Counter(
        family_of(code) for code in {record["pytorch_code"] for record in records if record["pytorch_code"]}
    )
    assert counts["other"] == 0 and len(counts) >= 5


@pytest.mark.skipif(not REAL, reason="TRITON_SFT_REAL_TRACES names no folder of real traces")
def test_few_modules_of_real_traces_have_no_family() -> None:
    records = json.loads((Path(REAL or "") / "gpt_oss_120b_single_turn.json").read_text(encoding="utf-8"))
    counts = Counter(family_of(code) for code in {record["pytorch_code"] for record in records})
    assert counts["other"] < 0.1 * counts.total()
    assert {"element-wise", "reduction", "loss", "pooling", "convolution"} <= set(counts)
