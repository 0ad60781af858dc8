"""The tiny base model: its tokenizer speaks as Trinity's does, its weights are the same whenever they are made, and it
never sees which kernel answers which prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError
from triton_sft_pipeline.files import sha256_file
from triton_sft_pipeline.training import tiny_base
from triton_sft_pipeline.training.tiny_base import Recipe, build_tiny_base, fragments, main

SHIPPED = Path(__file__).parents[2] / "data" / "tiny_base"
SMALL = Recipe(vocabulary=320, layers=2, steps=4, batch_size=4)


def trace(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "pytorch_code": f"def {name}(x): return torch.{name}(x)",
        "model_reasoning": f"One program computes {name} of a block.",
        "triton_code": f"@triton.jit\ndef {name}_kernel(x): ...",
        "result": {"correctness": True},
        **fields,
    }


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    path = tmp_path / "traces.json"
    path.write_text(json.dumps([trace(name) for name in ("relu", "tanh", "sigmoid")]))
    return path


@pytest.fixture(scope="module")
def tokenizer(afmoe_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(afmoe_dir)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_special_tokens_have_trinitys_ids(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 3, 12)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")


def test_the_generation_prompt_ends_in_an_open_think_tag(tokenizer: Any) -> None:
    asked = tokenizer.apply_chat_template([turn("user", "hi")], tokenize=False, add_generation_prompt=True)
    assert asked == "<|begin_of_text|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"


def test_only_the_last_answer_keeps_its_reasoning(tokenizer: Any) -> None:
    first, last = "<think>\nfirst thought\n</think>\n\nfirst", "<think>\nlast thought\n</think>\n\nlast"
    turns = [turn("user", "a"), turn("assistant", first), turn("user", "b"), turn("assistant", last)]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    written = [part.removesuffix("<|im_end|>\n") for part in text.split("<|im_start|>")[1:]]
    assert written == ["user\na", "assistant\nfirst", "user\nb", f"assistant\n{last}"]


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    text = "<think>\n\tα → β  x<y>\n</think>\n\n<triton>\nif a:\n        b = 1e-5\n</triton>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tags_of_reasoning_are_one_token_each(tokenizer: Any) -> None:
    assert [len(tokenizer(tag)["input_ids"]) for tag in ("<think>", "</think>")] == [1, 1]


def test_the_experts_differ_for_the_router_from_the_start(afmoe_dir: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(str(afmoe_dir / "model.safetensors"))
    router = weights["model.layers.1.mlp.router.gate.weight"]
    assert router.shape == (8, 64)
    assert all(row.any() for row in router)


def test_fragments_are_single_and_only_of_correct_traces(tmp_path: Path) -> None:
    path = tmp_path / "traces.json"
    wrong = trace("wrong", result={"correctness": False})
    path.write_text(json.dumps([trace("relu"), trace("relu"), wrong, trace("none", result=None), "no record"]))
    texts = fragments(path)
    assert len(texts) == 3
    assert [text.split("\n")[0] for text in texts[1:]] == ["<think>", "<triton>"]
    assert "torch.relu(x)" in texts[0]
    assert not any("torch.relu(x)" in text and "relu_kernel" in text for text in texts)


def test_traces_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('[{"pytorch_code":')
    for name in ("none.json", "broken.json"):
        with pytest.raises(PipelineError, match=rf"{name} cannot be read as a JSON array"):
            fragments(tmp_path / name)


def test_traces_of_which_none_is_correct_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps([trace("relu", result={"correctness": False})]))
    with pytest.raises(PipelineError, match=r"no trace with result\.correctness true"):
        fragments(path)


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_files_in_this_process_and_in_another(traces: Path, tmp_path: Path) -> None:
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    here = build_tiny_base(traces, tmp_path / "here", SMALL)
    assert torch.are_deterministic_algorithms_enabled() == before
    code = (
        "import sys; from pathlib import Path; from triton_sft_pipeline.training.tiny_base import *; "
        f"print(build_tiny_base(Path(sys.argv[1]), Path(sys.argv[2]), {SMALL!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(traces), str(tmp_path / "there")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    assert done.stdout.split() == [here], done.stderr
    for name in ("model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"):
        assert sha256_file(tmp_path / "here" / name) == sha256_file(tmp_path / "there" / name), name


def test_another_seed_gives_another_base(traces: Path, tmp_path: Path) -> None:
    small = Recipe(vocabulary=320, layers=1, steps=1)
    one = build_tiny_base(traces, tmp_path / "one", small)
    assert one != build_tiny_base(traces, tmp_path / "other", Recipe(vocabulary=320, layers=1, steps=1, seed=1))


@pytest.mark.parametrize(("rebuilt", "code"), [(b"same", 0), (b"another", 1)])
def test_check_compares_a_rebuild_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rebuilt: bytes, code: int
) -> None:
    # The command line caps vector units for its own process, which must not outlive the test.
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    shipped = tmp_path / "base" / "model.safetensors"
    shipped.parent.mkdir()
    shipped.write_bytes(b"same")

    def build(traces: Path, out: Path) -> str:
        (out / "model.safetensors").write_bytes(rebuilt)
        return sha256_file(out / "model.safetensors")

    monkeypatch.setattr(tiny_base, "build_tiny_base", build)
    assert main(["--traces", "unused", "--out", str(shipped.parent), "--check"]) == code
    assert shipped.read_bytes() == b"same"


def test_the_shipped_base_is_the_one_that_the_recipe_describes() -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    config = json.loads((SHIPPED / "config.json").read_text())
    recipe = Recipe()
    assert config["model_type"] == "afmoe"
    assert (config["hidden_size"], config["num_hidden_layers"]) == (recipe.hidden_size, recipe.layers)
    assert config["vocab_size"] == len(tokenizer) <= recipe.vocabulary
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 3, 12)
    assert tokenizer.chat_template == tiny_base.CHAT_TEMPLATE
    weights = load_file(str(SHIPPED / "model.safetensors"))
    routers = [value for name, value in weights.items() if name.endswith("router.gate.weight")]
    assert len(routers) == recipe.layers - 1
    assert all(router.any() for router in routers)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 4_000_000
