"""A merged checkpoint is base and adapter in one, appears whole or not at all, and is refused where it is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from triton_sft_pipeline.errors import PipelineError, StepError
from triton_sft_pipeline.files import read_json, sha256_file, write_json
from triton_sft_pipeline.training import merge as merge_module
from triton_sft_pipeline.training.merge import merge, plan_merge
from triton_sft_pipeline.training.trainer import TrainingRun
from triton_sft_pipeline.training.updates import AdapterFactors, kinds
from triton_sft_pipeline_tests.training.setups import adapter_weights

Tensors = dict[str, Any]

EVERYTHING = {
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "target_parameters": [
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
    ],
    "rank_pattern": {r"experts\.gate_up_proj": 2, r"experts\.down_proj": 3},
    "alpha_pattern": {r"experts\.gate_up_proj": 6, "up_proj.weight": 2},
}
"""The stock form of an adapter on all of an AFMoE, with ranks and alphas of their own."""


def save_adapter(model: Any, directory: Path, **options: Any) -> Any:
    """Put a random adapter on `model` with stock PEFT, save it, and return the PEFT model."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options})).eval()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    peft_model.save_pretrained(str(directory))
    return peft_model


def load(directory: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def weights_of(directory: Path) -> Tensors:
    """Name -> tensor of all weight files of a model directory."""
    from safetensors.torch import load_file

    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(str(path)).items()}


def pefts_own_merge(peft_model: Any, directory: Path) -> Tensors:
    """What PEFT's merge_and_unload saves."""
    peft_model.merge_and_unload().save_pretrained(directory)
    return weights_of(directory)


def assert_close(found: Tensors, expected: Tensors, tolerance: float) -> None:
    import torch

    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def changed(one: Tensors, other: Tensors) -> set[str]:
    import torch

    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.fixture(scope="session")
def base(afmoe_dir: Path) -> Path:
    return afmoe_dir


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on everything. Tests share it and break copies."""
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(load(base), directory, **EVERYTHING)
    return directory


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copied"))


@pytest.fixture
def copied_base(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copied_base"))


def rewritten(path: Path, change: Callable[[Tensors], Any]) -> None:
    """Save a safetensors file again with its tensors changed."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(path))
    change(tensors)
    save_file(tensors, str(path), {"format": "pt"})


def reconfigured(path: Path, **changes: Any) -> None:
    write_json(path, read_json(path) | changes)


def left_beside(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir() if out.name in path.name}


@pytest.mark.parametrize(
    "options",
    [
        EVERYTHING,
        {"target_modules": ["q_proj", "o_proj"], "use_rslora": True},
        {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]},
        {"target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj"]},
    ],
    ids=["everything", "rslora", "down_alone", "gate_up_alone"],
)
def test_a_merge_gives_the_numbers_of_pefts_own_merge(base: Path, options: dict[str, Any], tmp_path: Path) -> None:
    peft_model = save_adapter(load(base), tmp_path / "adapter", **options)
    report = merge(base, tmp_path / "adapter", tmp_path / "out")
    expected = pefts_own_merge(peft_model, tmp_path / "peft")
    assert_close(weights_of(tmp_path / "out"), expected, 2e-6)
    moved = changed(weights_of(base), expected)
    assert moved
    assert (report.updated, report.unmoved, report.tensors) == (len(moved), 0, len(expected))


def test_a_dense_model_is_merged_too(llama_dir: Path, tmp_path: Path) -> None:
    names = ["q_proj", "gate_proj", "down_proj"]
    peft_model = save_adapter(load(llama_dir), tmp_path / "adapter", target_modules=names, rank_pattern={"q_proj": 3})
    merge(llama_dir, tmp_path / "adapter", tmp_path / "out")
    expected = pefts_own_merge(peft_model, tmp_path / "peft")
    assert_close(weights_of(tmp_path / "out"), expected, 2e-6)
    assert len(changed(weights_of(llama_dir), expected)) == 6


def test_an_adapter_of_single_experts_is_merged_by_their_names(base: Path, copied: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    name = "model.layers.1.mlp.experts.3.gate_proj"
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    pair = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(pair, str(copied / "adapter_model.safetensors"))
    merge(base, copied, tmp_path / "out")
    before, after = weights_of(base), weights_of(tmp_path / "out")
    assert changed(before, after) == {f"{name}.weight"}
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + 2 * b @ a)


def test_the_adapter_that_training_writes_is_merged(trained: TrainingRun, base: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    report = merge(base, trained.adapter_dir, tmp_path / "out")
    stock = AutoPeftModelForCausalLM.from_pretrained(trained.adapter_dir)
    assert_close(weights_of(tmp_path / "out"), pefts_own_merge(stock, tmp_path / "peft"), 2e-6)
    # One dense layer with 5 + 3 linears; one layer with 5, 3 shared and 8 x 3 experts.
    assert (report.updated, report.unmoved) == (8 + 32, 0)


def test_a_bfloat16_base_is_added_to_in_float32_and_rounded_once(adapter: Path, base: Path, tmp_path: Path) -> None:
    import torch

    half = load(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    half.float().save_pretrained(tmp_path / "wide")
    merge(tmp_path / "half", adapter, tmp_path / "out")
    merge(tmp_path / "wide", adapter, tmp_path / "wide_out")
    found, exact = weights_of(tmp_path / "out"), weights_of(tmp_path / "wide_out")
    assert {value.dtype for name, value in found.items() if "_proj" in name} == {torch.bfloat16}
    for name, value in found.items():
        assert torch.equal(value, exact[name].to(value.dtype)), name


def test_the_merged_files_are_those_of_the_base_with_other_numbers(adapter: Path, base: Path, tmp_path: Path) -> None:
    load(base).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    files = {path.name for path in (tmp_path / "shards").glob("*.safetensors")}
    assert len(files) > 5
    merge(tmp_path / "shards", adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "whole")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == files
    for name in files:
        one, other = tmp_path / "shards" / name, tmp_path / "out" / name
        assert one.stat().st_size == other.stat().st_size
        assert header(one) == header(other)
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (tmp_path / "shards" / index).read_bytes()
    assert_close(weights_of(tmp_path / "out"), weights_of(tmp_path / "whole"), 0)


def header(path: Path) -> Any:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_what_belongs_to_the_model_is_copied_and_other_forms_of_it_are_not(
    adapter: Path, copied_base: Path, tmp_path: Path
) -> None:
    (copied_base / "README.md").write_text("About the base alone.")
    (copied_base / "pytorch_model.bin").write_text("")
    (copied_base / "pytorch_model.bin.index.json").write_text("{}")
    (copied_base / "LICENSE").write_text("Whose it is.")
    merge(copied_base, adapter, tmp_path / "out")
    beside = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"}
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert beside | {"model.safetensors", "merge.json"} <= made
    assert not made & {"README.md", "pytorch_model.bin", "pytorch_model.bin.index.json"}
    for name in beside:
        assert (tmp_path / "out" / name).read_bytes() == (copied_base / name).read_bytes()


def test_the_record_names_both_inputs_and_the_result_by_their_hashes(adapter: Path, base: Path, tmp_path: Path) -> None:
    report = merge(base, adapter, tmp_path / "out")
    record = read_json(tmp_path / "out" / "merge.json")
    assert record["base_sha256"] == {"model.safetensors": sha256_file(base / "model.safetensors")}
    assert record["adapter_sha256"] == sha256_file(adapter / "adapter_model.safetensors")
    assert record["merged_sha256"] == {"model.safetensors": sha256_file(tmp_path / "out" / "model.safetensors")}
    assert record["merged_sha256"] == report.files


def test_an_adapter_that_adds_nothing_leaves_the_base_to_the_bit_and_says_so(
    copied: Path, base: Path, tmp_path: Path
) -> None:
    rewritten(copied / "adapter_model.safetensors", lambda tensors: [t.zero_() for t in tensors.values()])
    report = merge(base, copied, tmp_path / "out")
    assert report.unmoved == report.updated == 40
    assert report.files == {"model.safetensors": sha256_file(base / "model.safetensors")}


STOCK_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, probe = sys.argv[1], torch.load(sys.argv[2])
model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
assert AutoTokenizer.from_pretrained(directory).pad_token == "<|pad|>"
with torch.no_grad():
    torch.testing.assert_close(model.eval()(probe["tokens"]).logits, probe["logits"], atol=1e-4, rtol=1e-4)
assert not [name for name in sys.modules if name.startswith(("triton_sft_pipeline", "peft"))]
print("same")
"""


@pytest.mark.slow
def test_the_merged_model_loads_without_this_project_and_answers_as_base_and_adapter(
    base: Path, tmp_path: Path
) -> None:
    import torch

    peft_model = save_adapter(load(base), tmp_path / "adapter", **EVERYTHING)
    tokens = torch.arange(20, 60)[None]
    with torch.no_grad():
        logits = peft_model(tokens).logits
        with peft_model.disable_adapter():
            assert (peft_model(tokens).logits - logits).abs().max() > 0.1
    torch.save({"tokens": tokens, "logits": logits}, tmp_path / "probe.pt")
    merge(base, tmp_path / "adapter", tmp_path / "out")
    command = [sys.executable, "-c", STOCK_LOAD, str(tmp_path / "out"), str(tmp_path / "probe.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "same\n", done.stderr


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def with_tensor(name: str, like: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensors[like].clone()})


LAYER = "base_model.model.model.layers.1"
QUERY = f"{LAYER}.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_tensor(f"{LAYER}.mlp.extra.lora_A.weight", f"{QUERY}.lora_A.weight"), "mlp.extra without its lora_B"),
        (with_tensor("base_model.model.lm_head.weight", f"{QUERY}.lora_A.weight"), r"1 of 37 .* no LoRA factors .*lm_"),
        (without(f"{QUERY}.lora_A.weight"), r"layers.1.self_attn.q_proj without its lora_A"),
        (lambda tensors: tensors.clear(), "holds no tensors"),
        (
            lambda tensors: tensors.update(
                {f"{QUERY}.lora_A.weight": tensors[f"{QUERY}.lora_A.weight"][:, :32].clone()}
            ),
            r"q_proj: lora_A is \[4, 32\] .* does not fit .*q_proj.weight \[64, 64\] at rank 4",
        ),
        (
            lambda tensors: tensors.update(
                {f"{LAYER}.mlp.experts.lora_A.weight": tensors[f"{QUERY}.lora_A.weight"].clone()}
            ),
            r"mlp.experts: lora_A is \[4, 64\] .* 8 experts such as model.layers.1.mlp.experts.0.gate_proj",
        ),
    ],
    ids=["half_a_pair", "whole_module", "lost_half", "empty", "another_shape", "another_shape_of_experts"],
)
def test_an_adapter_file_that_does_not_fit_is_named_and_nothing_is_written(
    base: Path, copied: Path, tmp_path: Path, change: Callable[[Tensors], Any], message: str
) -> None:
    rewritten(copied / "adapter_model.safetensors", change)
    with pytest.raises(PipelineError, match=message):
        merge(base, copied, tmp_path / "out")
    assert left_beside(tmp_path / "out") == set()


def test_tensors_without_a_home_are_counted_and_named(base: Path, copied: Path, tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.0." in name]:
            tensors[name.replace(".layers.0.", ".layers.7.")] = tensors.pop(name)

    rewritten(copied / "adapter_model.safetensors", rename)
    with pytest.raises(PipelineError, match=r"16 of 36 adapter tensors have no home .*layers.7.mlp.* and 11 more") as e:
        merge(base, copied, tmp_path / "out")
    assert "Name the base model that the adapter was trained on" in str(e.value)
    assert left_beside(tmp_path / "out") == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "all"}, "bias is all"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"r": None}, "r is not a number"),
        ({"r": 8}, "at rank 8"),
        ({"rank_pattern": {}}, r"8 experts such as .* at rank 4"),
        ({"rank_pattern": {"(": 2}}, "is no regular expression"),
    ],
)
def test_an_adapter_config_that_means_something_else_is_refused(
    base: Path, copied: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    reconfigured(copied / "adapter_config.json", **changes)
    with pytest.raises(PipelineError, match=message):
        merge(base, copied, tmp_path / "out")
    assert left_beside(tmp_path / "out") == set()


def quantised_config(base: Path) -> None:
    reconfigured(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})


def quantised_weight(base: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    rewritten(base / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].byte()}))


def fused_experts(base: Path) -> None:
    import torch

    def fuse(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]
        tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(8, 128, 64)

    rewritten(base / "model.safetensors", fuse)


def lost_expert(base: Path) -> None:
    rewritten(base / "model.safetensors", without("model.layers.1.mlp.experts.2.up_proj.weight"))


def cut_short(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def no_header(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def lost_shard(base: Path) -> None:
    load(base).save_pretrained(base, max_shard_size="100KB")
    sorted(base.glob("model-*.safetensors"))[1].unlink()


def wrong_index(base: Path) -> None:
    load(base).save_pretrained(base, max_shard_size="100KB")
    index = read_json(base / "model.safetensors.index.json")
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.norm.weight"]
    write_json(base / "model.safetensors.index.json", index)


def no_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def no_config(base: Path) -> None:
    (base / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (quantised_config, r"is quantised \(bitsandbytes\)"),
        (quantised_weight, r"q_proj.weight is U8"),
        (fused_experts, r"4 of 36 .* holds fused experts \(model.layers.1.mlp.experts.gate_up_proj\)"),
        (lost_expert, r"lacks model.layers.1.mlp.experts.2.up_proj.weight"),
        (cut_short, r"model.safetensors: damaged or cut short, \d+ bytes where its header promises"),
        (no_header, r"model.safetensors: damaged or cut short, its header does not fit"),
        (lost_shard, r"model-00002-of-\d+.safetensors is missing"),
        (wrong_index, r"index.json does not say what its files hold; the first difference: lm_head.weight"),
        (no_weights, "holds neither model.safetensors nor model.safetensors.index.json"),
        (no_config, r"config.json is missing: name the directory of an unquantised base model"),
    ],
)
def test_a_base_that_cannot_be_merged_into_is_named_and_nothing_is_written(
    copied_base: Path, adapter: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copied_base)
    if damage in (lost_shard, wrong_index):
        (copied_base / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(PipelineError, match=message):
        merge(copied_base, adapter, tmp_path / "out")
    assert left_beside(tmp_path / "out") == set()


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "/no/such/directory", "a b"])
def test_a_base_that_is_nowhere_is_named(adapter: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(PipelineError, match=f"{name}: neither a directory nor a model in the local cache"):
        merge(name, adapter, tmp_path / "out")


def test_a_base_that_was_fetched_before_goes_by_its_hub_name(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    # As the hub's client leaves it: a snapshot of links to files that lie under their hashes.
    model = tmp_path / "cache" / "models--nobody--afmoe"
    snapshot, revision = model / "snapshots" / ("a" * 40), model / "refs" / "main"
    shutil.copytree(base, model / "blobs")
    snapshot.mkdir(parents=True)
    for path in (model / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    revision.parent.mkdir()
    revision.write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    merge("nobody/afmoe", adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "same")
    assert sha256_file(tmp_path / "out" / "model.safetensors") == sha256_file(tmp_path / "same" / "model.safetensors")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_an_adapter_directory_without_an_adapter_is_named(base: Path, copied: Path, tmp_path: Path) -> None:
    (copied / "adapter_model.safetensors").unlink()
    with pytest.raises(PipelineError, match=r"adapter_model.safetensors is missing"):
        merge(base, copied, tmp_path / "out")
    with pytest.raises(PipelineError, match=r"adapter_config.json is missing: name a directory that training wrote"):
        merge(base, tmp_path, tmp_path / "out")


def test_numbers_that_are_none_stop_the_merge_and_leave_nothing(base: Path, copied: Path, tmp_path: Path) -> None:
    name = f"{QUERY}.lora_B.weight"
    rewritten(copied / "adapter_model.safetensors", lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(StepError, match=r"model.layers.1.self_attn.q_proj.weight with .* added is not finite"):
        merge(base, copied, tmp_path / "out")
    assert left_beside(tmp_path / "out") == set()


def test_what_is_at_the_destination_is_left_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(PipelineError, match="out is there already: remove it or choose another --out"):
        merge(base, adapter, out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    with pytest.raises(PipelineError, match="is there already"):
        merge(base, adapter, out / "mine")
    assert (out / "mine").read_text() == "kept"


def test_an_empty_destination_is_filled(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert left_beside(tmp_path / "out") == {"out"}


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(StepError, match=r"the merged model needs \d.* kB, but only 1.0 kB are free"):
        merge(base, adapter, tmp_path / "out")
    assert left_beside(tmp_path / "out") == set()


def test_a_disk_that_fills_up_meanwhile_is_told_and_nothing_is_kept(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merge_module.rewrite

    def fill_up(*arguments: Any) -> Any:
        real(*arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merge_module, "rewrite", fill_up)
    with pytest.raises(StepError, match=r"the disk is full\. Nothing of the merged model was kept"):
        merge(base, adapter, tmp_path / "out")
    assert left_beside(tmp_path / "out") == set()


def test_a_place_where_nothing_can_be_written_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(PipelineError, match=r"file: File exists\. Choose another --out"):
        merge(base, adapter, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "kept"


def once(action: Callable[[], None]) -> Callable[[int, int], None]:
    """A progress function that does `action` when it is first told of something written."""
    pending = [action]

    def progress(done: int, total: int) -> None:
        if pending:
            pending.pop()()

    return progress


def test_a_second_merge_to_the_same_place_is_refused_while_the_first_writes(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    def again() -> None:
        with pytest.raises(PipelineError, match="another merge is writing it"):
            merge(base, adapter, tmp_path / "out")
        merge(base, adapter, tmp_path / "elsewhere")

    first = merge(base, adapter, tmp_path / "out", progress=once(again))
    for name in ("out", "elsewhere"):
        assert first.files == {"model.safetensors": sha256_file(tmp_path / name / "model.safetensors")}
    assert left_beside(tmp_path / "out") == {"out"}


def test_a_directory_that_appears_meanwhile_is_left_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear() -> None:
        out.mkdir()
        (out / "mine").write_text("kept")

    with pytest.raises(PipelineError, match="appeared while the merge was written; it was left alone"):
        merge(base, adapter, out, progress=once(appear))
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert left_beside(out) == {"out"}


KILLED = """
import os, signal, sys
from pathlib import Path
from triton_sft_pipeline.training.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
merge(base, adapter, out, progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_merge_leaves_nothing_at_the_destination_and_the_next_one_clears_up(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(base), str(adapter), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert left_beside(out) == {".out.merging", ".out.merge.lock"}
    report = merge(base, adapter, out)
    assert report.files == {"model.safetensors": sha256_file(out / "model.safetensors")}
    assert left_beside(out) == {"out"}


def test_memory_does_not_grow_with_the_file(copied: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    side, count = 1536, 20
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(count)]
    (tmp_path / "large").mkdir()
    write_json(tmp_path / "large" / "config.json", {"model_type": "llama"})
    save_file({f"{name}.weight": torch.zeros(side, side) for name in names}, tmp_path / "large" / "model.safetensors")
    pairs = {f"base_model.model.{n}.lora_A.weight": torch.ones(4, side) for n in names}
    pairs |= {f"base_model.model.{n}.lora_B.weight": torch.ones(side, 4) for n in names}
    save_file(pairs, copied / "adapter_model.safetensors")
    seen: list[int] = []
    merge(tmp_path / "large", copied, tmp_path / "out", progress=lambda done, total: seen.append(anonymous_bytes()))
    assert len(seen) == count
    # The first tensors make room that the next ones use again.
    assert max(seen) - seen[3] < 8 * side * side * 4 < (count - 4) * side * side * 4


def anonymous_bytes() -> int:
    """Memory of this process that is no cached part of a file."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024


def test_every_tensor_of_the_adapter_is_read_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = adapter_weights(adapter)
    asked: list[str] = []

    class Source:
        def get_tensor(self, name: str) -> Any:
            asked.append(name)
            return tensors[name]

    plan = plan_merge(base, adapter)
    factors = AdapterFactors(Source())
    for shard in plan.shards:
        for name, info in shard.tensors.items():
            if name in plan.updates:
                assert tuple(factors.delta(plan.updates[name]).shape) == info.shape
    assert sorted(asked) == sorted(tensors)


def test_progress_ends_at_the_total(base: Path, adapter: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    merge(base, adapter, tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert len(told) == len(weights_of(base))
    assert told[-1][0] == (base / "model.safetensors").stat().st_size >> 20


def test_a_plan_counts_what_changes_and_writes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    plan = plan_merge(base, adapter)
    assert kinds(plan.updates)["model.layers.*.mlp.experts.*.up_proj.weight"] == 8
    assert kinds(plan.updates)["model.layers.*.self_attn.q_proj.weight"] == 2
    assert sum(kinds(plan.updates).values()) == 40
    assert plan.size > (base / "model.safetensors").stat().st_size
    assert list(tmp_path.iterdir()) == []


def test_planning_and_settings_import_no_heavy_library() -> None:
    code = (
        "import sys, triton_sft_pipeline.training.merge\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "[]\n", done.stderr


def test_the_shipped_base_is_in_the_released_layout(tmp_path: Path) -> None:
    from triton_sft_pipeline.config import data_dir

    tiny = data_dir() / "tiny_base"
    peft_model = save_adapter(load(tiny), tmp_path / "adapter", **EVERYTHING)
    report = merge(tiny, tmp_path / "adapter", tmp_path / "out")
    assert report.updated == 8 + 3 * 32
    assert_close(weights_of(tmp_path / "out"), pefts_own_merge(peft_model, tmp_path / "peft"), 2e-6)
