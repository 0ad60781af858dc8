"""What a problem would download is found in its code, by name, and looked for in the Hub's local cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from triton_sft_pipeline.problems.weights import Needed, hub_models, missing_weights, needed_weights
from triton_sft_pipeline_tests.problems.codes import CODE, LEVEL_4, cached

START = "import torch\nfrom transformers import AutoModel, AutoConfig, AutoTokenizer\nimport transformers\n"


def names(code: str) -> list[str]:
    return [need.name for need in needed_weights(START + code)]


def test_a_problem_of_level_4_needs_its_configuration_and_its_weights() -> None:
    assert needed_weights(LEVEL_4) == [Needed("owner/lm-small", "weights"), Needed("owner/lm-small", "config")]
    assert needed_weights(CODE) == []


MODEL = "class Model(torch.nn.Module):\n    def __init__(self, {p}):\n        self.m = AutoModel.from_pretrained({p})\n"


@pytest.mark.parametrize(
    "code",
    [
        "m = AutoModel.from_pretrained('a/b')",
        "m = transformers.AutoModel.from_pretrained(pretrained_model_name_or_path='a/b')",
        "NAME: str = 'a/b'\nm = AutoModel.from_pretrained(NAME)",
        "OWNER = 'a'\nm = AutoModel.from_pretrained(OWNER + '/b')",
        "OWNER = 'a'\nm = AutoModel.from_pretrained(f'{OWNER}/b')",
        "class Model(torch.nn.Module):\n    name = 'a/b'\n    def forward(self, x):\n"
        "        return AutoModel.from_pretrained(self.name)(x)",
        "class Model(torch.nn.Module):\n    def __init__(self):\n        which = 'a/b'\n"
        "        self.m = AutoModel.from_pretrained(which)",
        MODEL.format(p="name") + "def get_init_inputs():\n    return ['a/b']",
        MODEL.format(p="name") + "def get_init_inputs():\n    return [[], {'name': 'a/b'}]",
        MODEL.format(p="name") + "def get_init_inputs():\n    which = 'a/b'\n    return [[which], {}]",
        MODEL.format(p="name").replace("name)", "name='a/b')", 1),
        MODEL.format(p="name").replace("Model(torch", "Inner(torch")
        + "class Model(torch.nn.Module):\n    def __init__(self):\n        self.inner = Inner(name='a/b')",
        "def loaded(name):\n    return AutoModel.from_pretrained(name)\nm = loaded('a/b')",
    ],
)
def test_a_name_is_followed_to_where_it_is_said(code: str) -> None:
    assert names(code) == ["a/b"]


@pytest.mark.parametrize(
    "code",
    [
        "import os\nm = AutoModel.from_pretrained(os.environ['NAME'])",
        "name = name\nm = AutoModel.from_pretrained(name)",
        MODEL.format(p="name"),
    ],
)
def test_a_name_that_is_worked_out_when_it_runs_is_told_as_it_is_written(code: str, hub_cache: Path) -> None:
    (name,) = names(code)
    assert name.startswith("`") and name.endswith("`")
    assert name in (missing_weights(START + code) or "")


@pytest.mark.parametrize(
    "code",
    [
        "m = AutoModel.from_config(AutoConfig.for_model('gpt2'))",
        "if __name__ == '__main__':\n    AutoModel.from_pretrained('a/b')",
        "# AutoModel.from_pretrained('a/b')\ntext = \"AutoModel.from_pretrained('a/b')\"",
        "class Gpt(torch.nn.Module):\n    @classmethod\n    def from_pretrained(cls, name):\n"
        "        return AutoModel.from_pretrained(name)",
        "import torchvision\nm = torchvision.models.resnet18(weights=None, pretrained=False)",
    ],
)
def test_what_downloads_nothing_needs_nothing(code: str) -> None:
    assert names(code) == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("m = torch.hub.load('pytorch/vision', 'resnet18')", "pytorch/vision"),
        ("import torchvision\nm = torchvision.models.resnet18(weights='DEFAULT')", "torchvision.models.resnet18"),
        ("import timm\nm = timm.create_model('vit', pretrained=True)", "timm.create_model"),
        ("from huggingface_hub import hf_hub_download\nm = hf_hub_download('a/b', 'w.bin')", "a/b"),
    ],
)
def test_other_downloads_are_needed_whatever_the_cache_holds(code: str, name: str, hub_cache: Path) -> None:
    assert names(code) == [name]
    assert name in (missing_weights(START + code) or "")


@pytest.mark.parametrize(
    ("of", "files", "enough"),
    [
        ("AutoModel", [], False),
        ("AutoModel", ["config.json"], False),
        ("AutoModel", ["model.safetensors"], False),
        ("AutoModel", ["config.json", "model.safetensors"], True),
        ("AutoModel", ["config.json", "pytorch_model.bin"], True),
        ("AutoConfig", ["config.json"], True),
        ("AutoConfig", ["model.safetensors"], False),
        ("AutoTokenizer", ["config.json"], False),
        ("AutoTokenizer", ["tokenizer.json"], True),
    ],
)
def test_the_cache_must_hold_what_is_loaded(of: str, files: list[str], enough: bool, hub_cache: Path) -> None:
    cached(hub_cache, "a/b", *files)
    assert (missing_weights(f"{START}m = {of}.from_pretrained('a/b')") is None) == enough


def test_all_shards_must_be_there(hub_cache: Path) -> None:
    code = f"{START}m = AutoModel.from_pretrained('a/b')"
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    cached(hub_cache, "a/b", "model.safetensors.index.json", content=json.dumps(index).encode())
    cached(hub_cache, "a/b", "config.json", "model-1.safetensors")
    assert "a/b" in (missing_weights(code) or "")
    cached(hub_cache, "a/b", "model-2.safetensors")
    assert missing_weights(code) is None


def test_another_revision_is_another_thing(hub_cache: Path) -> None:
    cached(hub_cache, "a/b", "config.json", "model.safetensors")
    assert missing_weights(f"{START}m = AutoModel.from_pretrained('a/b', revision='main')") is None
    assert missing_weights(f"{START}m = AutoModel.from_pretrained('a/b', revision='v2')") is not None


def test_a_local_folder_counts_and_a_name_that_no_repository_can_have_does_not(hub_cache: Path, tmp_path: Path) -> None:
    assert missing_weights(f"{START}m = AutoModel.from_pretrained({str(tmp_path)!r})") is None
    assert missing_weights(f"{START}m = AutoModel.from_pretrained('/no/such folder')") is not None


def test_the_repositories_of_several_problems_are_named_once_and_without_what_is_none(tmp_path: Path) -> None:
    start = "from transformers import AutoModel\nimport os, torch\n"
    codes = [
        LEVEL_4,
        LEVEL_4,
        CODE,
        start + "m = AutoModel.from_pretrained('a/b')",
        start + f"m = AutoModel.from_pretrained({str(tmp_path)!r})",
        start + "m = AutoModel.from_pretrained(os.environ['NAME'])",
        start + "m = torch.hub.load('c/d', 'e')",
        "class Model(",
    ]
    assert hub_models(codes) == ["a/b", "owner/lm-small"]
