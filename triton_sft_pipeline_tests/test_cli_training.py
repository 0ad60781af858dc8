"""`triton-sft merge` from a shell: what is printed, what is written, and what a wrong call is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from triton_sft_pipeline.config import data_dir
from triton_sft_pipeline.files import write_json
from triton_sft_pipeline_tests.commands import Run

BASE = data_dir() / "tiny_base"
QUERY = "base_model.model.model.layers.2.self_attn.q_proj"
EXPERTS = "base_model.model.model.layers.2.mlp.experts"


def save_adapter(directory: Path, size: float = 0.1) -> Path:
    """A small adapter in PEFT's format: one linear layer and the gate_up tensor of one layer's eight experts."""
    import torch
    from safetensors.torch import save_file

    shapes = {f"{QUERY}.lora_A": (2, 64), f"{QUERY}.lora_B": (64, 2)}
    shapes |= {f"{EXPERTS}.lora_A": (16, 64), f"{EXPERTS}.lora_B": (128, 16)}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{name}.weight": torch.full(shape, size) for name, shape in shapes.items()},
        directory / "adapter_model.safetensors",
    )
    write_json(directory / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    return directory


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter")


def test_a_merge_says_what_changed_and_where_it_is(run: Run, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("merge", "--base", BASE, "--adapter", adapter, "--out", out) == (
        0,
        f"merged   17 of 137 tensors changed\nwritten  {out}\n",
        "",
    )
    assert {"config.json", "model.safetensors", "tokenizer.json", "merge.json"} <= {p.name for p in out.iterdir()}


def test_an_adapter_that_adds_nothing_is_told(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(
        "merge", "--base", BASE, "--adapter", save_adapter(tmp_path / "zero", 0.0), "--out", tmp_path / "out"
    )
    assert code == 0
    assert "note     17 of them kept their numbers" in out


def test_a_dry_run_lists_what_would_change_and_how_large_it_is(run: Run, adapter: Path, tmp_path: Path) -> None:
    code, out, err = run("merge", "--base", BASE, "--adapter", adapter, "--out", tmp_path / "out", "--dry-run")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:6] == [
        f"base {BASE}",
        f"adapter {adapter}",
        "changes 17 of 137 tensors",
        "model.layers.*.mlp.experts.*.gate_proj.weight 8",
        "model.layers.*.mlp.experts.*.up_proj.weight 8",
        "model.layers.*.self_attn.q_proj.weight 1",
    ]
    assert lines[6] == "writes 2.1 MB in 7 files"
    assert lines[7].startswith("free ")
    assert not (tmp_path / "out").exists()
    assert run("merge", "--base", BASE, "--adapter", adapter, "--dry-run")[0] == 0


def test_wrong_calls_end_with_2_and_one_message(run: Run, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    for arguments, message in (
        (("--base", BASE, "--adapter", adapter), "Missing option '--out'"),
        (("--base", BASE, "--adapter", tmp_path, "--out", tmp_path / "out"), "adapter_config.json is missing"),
        (("--base", BASE, "--adapter", adapter, "--out", tmp_path / "taken"), "is there already"),
        (("--base", BASE, "--adapter", adapter, "--out", tmp_path / "taken", "--dry-run"), "is there already"),
        (("--base", "nobody/nothing", "--adapter", adapter, "--dry-run"), "nor a model in the local cache"),
    ):
        code, _, err = run("merge", *arguments)
        assert code == 2
        assert message in err
        assert "Traceback" not in err and "This is a bug" not in err
    assert not (tmp_path / "out").exists()


def test_the_help_teaches_and_fits_the_screen(run: Run) -> None:
    code, out, _ = run("merge", "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    for word in ("--dry-run", "vllm serve", "Exit code 0", "merge.json"):
        assert word in out
