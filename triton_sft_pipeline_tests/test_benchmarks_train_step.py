"""The training benchmark on a toy shape: the real code path from end to end, and what the report makes of figures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPT = FOLDER / "train_step.py"
NAMES = ("", "_models", "_measure", "_profile", "_yardsticks", "_report")
TINY = ("--preset", "tiny", "--shape", "tiny", "--seq", "32", "--warmup", "1", "--steps", "2")


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The scripts import each other by bare names, as they do when one is run; no other test shall see those names.
    What a part writes goes into a temporary folder, as it does when the program starts it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    for name in ("judge_machine", *(f"train_step{suffix}" for suffix in NAMES)):
        sys.modules.pop(name, None)


def load(suffix: str = "") -> Any:
    return importlib.import_module(f"train_step{suffix}")


def tiny_job(**changed: Any) -> Any:
    return load("_measure").Job(**{"preset": "tiny", "shape": "tiny", "seq": 32, "warmup": 1, "steps": 2, **changed})


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The models


def test_the_shape_is_trinity_mini() -> None:
    import torch

    model = load("_models").empty_model("trinity-mini", None, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 26_123_974_400
    assert all(parameter.is_meta for parameter in model.parameters())
    kinds = model.config.layer_types
    assert [index for index, kind in enumerate(kinds) if kind == "full_attention"] == list(range(3, 32, 4))


def test_another_size_is_an_error_and_not_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    models = load("_models")
    monkeypatch.setitem(models.PARAMETERS, "tiny", 1)
    with pytest.raises(AssertionError, match=r"tiny has [0-9,]+ parameters here, where it should have 1"):
        models.empty_model("tiny", None, torch.float32)


def test_a_random_model_is_made_of_what_a_loaded_one_is_made_of(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from triton_sft_pipeline.training.model import load_model_and_tokenizer
    from triton_sft_pipeline.training.settings import ModelSettings

    models = load("_models")
    AutoModelForCausalLM.from_config(models.shape_config("tiny")).save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    settings = ModelSettings(base_model=str(tmp_path), compute_dtype="float32")
    loaded, _ = load_model_and_tokenizer(settings)
    made = models.packed_model("tiny", None, settings, "cpu")

    def contents(model: Any) -> dict[str, Any]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors}

    def modules(model: Any) -> dict[str, str]:
        return {name: type(module).__qualname__ for name, module in model.named_modules()}

    assert contents(made) == contents(loaded)
    assert modules(made) == modules(loaded)
    for name in ("is_loaded_in_4bit", "quantization_method", "training", "dtype"):
        assert getattr(made, name) == getattr(loaded, name), name


def test_random_weights_spread_as_the_architecture_would_draw_them() -> None:
    import torch

    from triton_sft_pipeline.training.experts.module import PackedExperts
    from triton_sft_pipeline.training.settings import ModelSettings

    model = load("_models").packed_model("tiny", None, ModelSettings(compute_dtype="float32"), "cpu")
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert [module.is_packed for module in experts] == [True]
    for weight in (experts[0].weight("gate_up_proj"), model.lm_head.weight):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.2)
    assert float(model.model.norm.weight.min()) == float(model.model.norm.weight.max()) == 1.0
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(32)[None]).logits).all()


def test_operations_are_those_of_the_weights_that_a_token_meets() -> None:
    import torch

    from triton_sft_pipeline.training.lora import attach_lora, create_lora_config
    from triton_sft_pipeline.training.settings import LoraSettings, ModelSettings

    models = load("_models")
    config, lora = models.shape_config("tiny"), LoraSettings(r=4, expert_r=2, alpha=8)
    share = config.num_experts_per_tok / config.num_experts
    stock = models.empty_model("tiny", None, torch.float32)
    met = sum(
        parameter.numel() * (share if ".experts." in name else 1)
        for name, parameter in stock.named_parameters()
        if "norm" not in name and "bias" not in name and "embed" not in name
    )
    model = attach_lora(
        models.packed_model("tiny", None, ModelSettings(compute_dtype="float32"), "cpu"), create_lora_config(lora)
    )
    adapter = sum(
        parameter.numel() * (share if ".experts." in name else 1)
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    )
    # Of 20 tokens one sees 10.5 on average in full attention, and at most 16 through the window of 16.
    seen = sum(10.5 if "full" in kind else (16 * 17 / 2 + 4 * 16) / 20 for kind in config.layer_types)
    scores = 4 * config.num_attention_heads * config.head_dim * seen
    work = models.work_a_token(config, lora, 20, 1.0, checkpointing=True)
    assert work.model == pytest.approx(4 * met + 6 * adapter + 3 * scores)
    head = config.hidden_size * config.vocab_size
    assert work.executed - work.model == pytest.approx(2 * (met - head) + 2 * adapter + scores)
    half = models.work_a_token(config, lora, 20, 0.5, checkpointing=False)
    assert half.model == half.executed == pytest.approx(work.model - 2 * head)


def test_learnable_rows_can_be_learned_and_random_ones_cannot() -> None:
    models = load("_models")
    walked, drawn = (make(4, 400, 512, seed=1) for make in (models.learnable_rows, models.random_rows))

    def followers(rows: list[list[int]]) -> int:
        after: dict[int, set[int]] = {}
        for row in rows:
            for token, follower in pairwise(row):
                after.setdefault(token, set()).add(follower)
        return max(map(len, after.values()))

    assert followers(walked) <= 4 < followers(drawn)
    assert models.learnable_rows(4, 400, 512, seed=1) == walked


# The measurement


@pytest.mark.slow
def test_the_benchmark_runs_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = run(*TINY, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    step = result["step"]
    assert (step["steps_done"], step["steps_asked"], step["step_s"]["count"]) == (3, 3, 2)
    assert step["tokens_a_step"] == 64
    assert step["tokens_per_s"] == pytest.approx(64 / step["step_s"]["median"])
    assert 0 < step["share"]["model"] <= step["share"]["executed"]
    assert result["about"]["versions"].keys() >= {"torch", "transformers", "trl", "peft", "bitsandbytes"}
    assert "tokens/s on 1 GPU" in done.stdout
    assert result["table"] + "\n" == done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_part_that_takes_too_long_costs_nothing_but_itself(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = run(*TINY, "--plain", "--part-timeout", "1", "--out", str(out))
    assert done.returncode == 1
    result = json.loads(out.read_text())
    for part in ("step", "plain"):
        assert result[part]["failed"] == "did not end within 1 s (--part-timeout)"
    assert done.stdout.count("MISSED") == 2


def test_ending_a_part_ends_what_it_started_too() -> None:
    train_step = load()
    process = subprocess.Popen(
        ["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) > 0
    train_step.end(process)
    assert process.returncode == -9
    # Its pipe is closed only when nobody holds the other end any more.
    assert process.stdout.read() == ""
    train_step.end(process)


def test_only_the_project_is_put_under_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    train_step, caps = load(), {}
    for part, module, name in (
        ("step", "_measure", "measure"),
        ("plain", "_measure", "measure"),
        ("profile", "_profile", "profile"),
        ("loop", "_yardsticks", "loop"),
        ("stock", "_yardsticks", "stock"),
    ):
        monkeypatch.setattr(load(module), name, lambda job: {"cap": job.cap_gib})
        caps[part] = train_step.figures_of(part, tiny_job(cap_gib=22.3))["cap"]
    assert caps == {"step": 22.3, "plain": None, "profile": None, "loop": None, "stock": None}


def test_nothing_to_measure_is_a_usage_error_before_anything_is_imported() -> None:
    done = run("--steps", "0")
    assert done.returncode == 2
    assert "nothing to measure" in done.stderr


def test_asking_for_help_does_not_import_torch() -> None:
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import train_step; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_steps_before_a_failure_are_reported(one_thread: None) -> None:
    from types import SimpleNamespace

    import torch

    class Trainer:
        model = torch.nn.Linear(2, 2)
        args = SimpleNamespace(max_steps=5, optim="adamw_torch")
        state = SimpleNamespace(log_history=[{"loss": 2.0}, {"train_runtime": 1.0}])

        def add_callback(self, callback: Any) -> None:
            self.callback = callback

        def train(self) -> None:
            for _ in range(3):
                self.callback.on_step_end()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")

    found = load("_measure").trained(Trainer(), 1, 100, "cpu")
    assert found["failed"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB."
    assert (found["steps_done"], found["steps_asked"], found["step_s"]["count"]) == (3, 5, 2)
    assert (found["losses"], found["trainable_parameters"]) == ([2.0], 6)


def test_the_loss_leaves_out_the_share_that_is_prompt(one_thread: None) -> None:
    trainer = load("_measure").project_trainer(tiny_job(prompt_share=0.25), "cpu", 1)
    for row in trainer.train_dataset:
        assert row["labels"][:8] == [-100] * 8
        assert row["labels"][8:] == row["input_ids"][8:]
    assert len(trainer.train_dataset) == 2


def test_only_dropout_differs_between_two_curves(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    measure = load("_measure")
    job = tiny_job(curve_steps=3)
    without = [measure.loss_curve(job, seed)["losses"] for seed in (1, 2)]
    assert without[0] == without[1]
    assert len(set(without[0])) == 3

    plain = measure.Job.config

    def with_dropout(self: Any) -> Any:
        config = plain(self)
        return config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.5})})

    monkeypatch.setattr(measure.Job, "config", with_dropout)
    curves = [measure.loss_curve(job, seed)["losses"] for seed in (1, 1, 2)]
    assert curves[0] == curves[1] != curves[2]
    # The adapter does nothing before its first step, so that dropout cannot show yet.
    assert curves[0][0] == curves[2][0] == without[0][0]


def test_both_yardsticks_train(one_thread: None) -> None:
    yardsticks = load("_yardsticks")
    loop, stock = yardsticks.loop(tiny_job()), yardsticks.stock(tiny_job())
    for found, steps in ((loop, 3), (stock, 6)):
        assert "failed" not in found
        assert found["steps_done"] == steps
        assert found["tokens_per_s"] > 0
    assert loop["adapter"] == "q_proj, k_proj, v_proj, o_proj"
    # What makes it a yardstick: the stock libraries reach the fused experts, and neither gates nor shared experts.
    assert "mlp.experts" in stock["adapter"]
    assert "shared_experts" not in stock["adapter"] and "self_attn.gate_proj" not in stock["adapter"]


def test_the_loop_of_experts_computes_what_fused_experts_compute() -> None:
    import torch
    from transformers.models.afmoe.modeling_afmoe import AfmoeExperts

    torch.manual_seed(0)
    fused = AfmoeExperts(load("_models").shape_config("tiny"))
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    loop = load("_yardsticks")._expert_loop(fused)
    for number, expert in enumerate(loop.each):
        gate, up = fused.gate_up_proj[number].chunk(2)
        for layer, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", fused.down_proj[number])):
            getattr(expert, layer).weight.data = weight.data
    x, weights = torch.randn(10, 64), torch.rand(10, 2)
    index = torch.stack([torch.randperm(8)[:2] for _ in range(10)])
    assert torch.allclose(loop(x, index, weights), fused(x, index, weights), atol=1e-5)


@pytest.mark.parametrize(("preset", "measured"), [("trinity-mini", 98.7), ("trinity-mini-24gb", 56.2)])
def test_what_the_stock_stack_needs_is_known_before_it_is_built(preset: str, measured: float) -> None:
    needed = load("_yardsticks").stock_needs_gib(load("_measure").Job(preset))
    assert needed == pytest.approx(measured, rel=0.08)


# Where the time goes


def event(kind: str, name: str, start: float, length: float, thread: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "tid": thread, "args": arguments}


def launched(number: int, start: float, kernel: str, length: float = 10.0, thread: int = 1) -> list[dict[str, Any]]:
    """A kernel on the device long after the call that launched it."""
    return [
        event("cuda_runtime", "cudaLaunchKernel", start, 1.0, thread, correlation=number),
        event("kernel", kernel, 1000.0 + 20 * number, length, 7, correlation=number),
    ]


def product(name: str, start: float, *shapes: list[int]) -> dict[str, Any]:
    return event("cpu_op", name, start, 5.0) | {"args": {"Input Dims": [*shapes, []]}}


def test_a_kernel_belongs_to_what_launched_it() -> None:
    profile = load("_profile")
    wide, tall = [4096, 2048], [2048, 2048]
    events = [
        product("aten::mm", 0.0, wide, tall),
        *launched(1, 1.0, "nvjet_hsh_256x128"),
        product("aten::mm", 10.0, wide, [2048, 256]),
        *launched(2, 11.0, "nvjet_hsh_64x64"),
        product("aten::_grouped_mm", 20.0, [32768, 2048], [128, 2048, 2048], [128]),
        *launched(3, 21.0, "cutlass::device_kernel<GemmUniversal>"),
        product("aten::_grouped_mm", 30.0, [32768, 8], [128, 8, 2048], [128]),
        *launched(4, 31.0, "cutlass::device_kernel<GemmUniversal>"),
        event("cpu_op", "autograd::engine::evaluate_function: _ChunkedLogProbFunctionBackward", 40.0, 20.0, 2),
        *launched(5, 45.0, "nvjet_hsh_256x128", thread=2),
        event("user_annotation", "Optimizer.step#AdamW8bit.step", 100.0, 50.0),
        *launched(6, 110.0, "kOptimizerStatic8bit2StateBlockwise"),
        event("cpu_op", "DecoderLayer", 200.0, 100.0),
        *launched(7, 201.0, "_rms_norm_backward"),
        *launched(8, 203.0, "_dequantize"),
        *launched(9, 205.0, "_gather_dropout"),
        *launched(10, 207.0, "_combine"),
        *launched(12, 208.0, "_shrink"),
        event("cpu_op", "aten::_flash_attention_forward", 210.0, 5.0),
        *launched(11, 211.0, "some_kernel"),
        event("kernel", "mystery", 2000.0, 10.0, 7),
        event("gpu_user_annotation", "Optimizer.step#AdamW8bit.step", 1000.0, 9999.0, 7),
    ]
    launches = profile.read_trace(events)
    found = profile.taken_apart(launches, narrow=256, vocabulary=200192)
    launches_in = {name: bucket["launches"] for name, bucket in found["buckets"].items()}
    assert launches_in == {
        "attention": 1,
        "expert grouped GEMM": 1,
        "other GEMM": 1,
        "dequantisation": 1,
        "LoRA and dropout": 4,
        "norms, element-wise": 1,
        "routing, gather, combine": 1,
        "head and loss": 1,
        "optimiser": 1,
        "other": 1,
    }
    assert found["launches"] == 13
    assert found["busy_s"] == pytest.approx(130e-6)


def test_a_product_over_the_vocabulary_is_the_heads() -> None:
    profile = load("_profile")
    events = [product("aten::mm", 0.0, [4096, 2048], [2048, 200192]), *launched(1, 1.0, "nvjet")]
    (launch,) = profile.read_trace(events)
    assert profile.bucket(launch, narrow=256, vocabulary=200192) == profile.HEAD


def test_kernels_that_run_at_once_keep_the_device_busy_once() -> None:
    profile = load("_profile")
    spans = [(0.0, 10.0), (5.0, 10.0), (6.0, 2.0), (30.0, 5.0)]
    launches = [profile.Launch("kernel", start, length) for start, length in spans]
    assert profile.busy(launches) == pytest.approx(20e-6)


def test_one_step_is_taken_apart_without_a_gpu_too(one_thread: None) -> None:
    found = load("_profile").profile(tiny_job())
    assert sum(bucket["seconds"] for bucket in found["buckets"].values()) == pytest.approx(found["busy_s"])
    assert 0 < found["busy_s"] <= found["wall_s"]
    assert found["idle_s"] == pytest.approx(found["wall_s"] - found["busy_s"])
    for name in ("head and loss", "optimiser", "attention", "dequantisation"):
        assert found["buckets"][name]["launches"] > 0, name
    # 32 tokens, 2 of 8 experts each.
    assert found["tokens_an_expert"]["mean"] == 8.0


# The report


def figures(tokens_per_s: float = 15_000.0, peak: float = 20.0, **changed: Any) -> dict[str, Any]:
    memory = {"now_gib": 14.0, "allocated_gib": 19.5, "reserved_gib": peak, "gpu_used_gib": 22.6, "retries": 0}
    return {
        "gpus": 1,
        "tokens_per_s": tokens_per_s,
        "step_s": {"median": 0.5461, "p10": 0.5, "p90": 0.6, "count": 45.0},
        "steps_done": 50,
        "steps_asked": 50,
        "cap_gib": 22.3,
        "share": {"model": 0.29, "executed": 0.41},
        "flops_a_token": {"model": 15.4e9, "executed": 21.7e9},
        "ceiling_tflops": 789.5,
        "memory": memory,
        "built": memory,
        "trainable_parameters": 289_000_000,
        "fused": {"layers": 32, "passes": 110},
        "losses": [12.3, 12.2],
        **changed,
    }


def result(gpu: str | None = "NVIDIA H200", **parts: Any) -> dict[str, Any]:
    options = {"preset": "trinity-mini-24gb", "shape": "trinity-mini", "layers": None, "seq": 4096, "batch": 1}
    found = {
        "options": options | {"accumulation": 2, "gpus": 1, "prompt_share": 0.6},
        "about": {
            "gpu": {"name": gpu, "driver": "580.1"} if gpu else None,
            "versions": {"torch": "2.11.0+cu130", "transformers": "5.17.0", "trl": "1.16.0"},
            "commit": "abcdef0",
        },
    }
    return found | parts


def missed(found: dict[str, Any]) -> list[str]:
    return [row.what.strip() for row in load("_report").rows(found) if row.met is False]


def met(found: dict[str, Any]) -> list[str]:
    return [row.what.strip() for row in load("_report").rows(found) if row.met]


def test_every_target_of_the_preset_is_held_against_what_was_measured() -> None:
    assert met(result(step=figures())) == [
        "tokens/s on 1 GPU",
        "peak GiB, reserved",
        "steps that passed under a cap of 22.3 GiB",
    ]
    assert missed(result(step=figures(14_499.0, 21.1))) == ["tokens/s on 1 GPU", "peak GiB, reserved"]


def test_fifty_steps_under_the_cap_are_what_counts() -> None:
    cap = "steps that passed under a cap of 22.3 GiB"
    assert cap in missed(result(step=figures(steps_done=20, failed="OutOfMemoryError: CUDA out of memory")))
    few = result(step=figures(steps_done=25, steps_asked=25))
    assert cap not in missed(few) + met(few)
    wide = result(step=figures(cap_gib=40.0))
    assert not any("cap" in what for what in missed(wide) + met(wide))


@pytest.mark.parametrize("changed", [{"layers": 8}, {"seq": 1024}, {"batch": 2}, {"shape": "tiny"}, {"preset": "tiny"}])
def test_another_model_or_batch_has_no_target(changed: dict[str, Any]) -> None:
    found = result(step=figures(1.0, 99.0))
    found["options"] |= changed
    assert missed(found) == []


def test_speed_is_a_target_of_one_h200_and_memory_of_every_gpu() -> None:
    assert missed(result("NVIDIA H100 80GB HBM3", step=figures(1.0, 99.0))) == ["peak GiB, reserved"]
    assert missed(result(None, step=figures(1.0, 99.0))) == []


def test_curves_are_within_noise_when_dropout_moves_them_as_far() -> None:
    report = load("_report")
    plain, other = [12.0, 11.0, 10.0], [12.0, 11.01, 9.99]

    def curves(fast: list[float], passes: int = 3) -> dict[str, Any]:
        found = report.compared(fast, plain, other)
        return {"steps": 3, "compared": found, "plain": plain, "fused": {"layers": 8, "passes": passes}}

    near, far = curves([12.0, 10.99, 10.01]), curves([12.0, 11.05, 10.05])
    assert near["compared"]["signed_difference"] == pytest.approx(0.0)
    assert near["compared"]["mean_difference"] == pytest.approx(near["compared"]["mean_spread"])
    assert missed(result(curves=near)) == []
    assert missed(result(curves=far)) == ["mean within 2 times dropout's"]
    # Where nothing was fused, nothing was compared.
    assert met(result(curves=curves([12.0, 11.0, 10.0], passes=0))) == []


def test_no_line_is_cut_or_wider_than_eighty_columns() -> None:
    report, profile = load("_report"), load("_profile")
    taken = {
        "buckets": {name: {"seconds": 0.1, "launches": 12_345} for name in profile.BUCKETS},
        "launches": 12_345,
        "wall_s": 0.28,
        "busy_s": 0.25,
        "idle_s": 0.03,
        "tokens_an_expert": {"mean": 256.0, "max": 4096.0},
    }
    found = result(
        step=figures(failed="OutOfMemoryError: " + "CUDA out of memory, tried to allocate " * 20, gpus=8),
        one_gpu=figures(),
        profile=taken,
        plain=figures(6_000.0),
        curves={
            "steps": 50,
            "compared": report.compared([12.0, 11.0], [12.0, 11.0], [12.0, 11.1]),
            "plain": [12.0, 11.0],
            "fused": {"layers": 8, "passes": 100},
        },
        loop=figures(362.0),
        stock={"skipped": "needs about 101 GiB, this GPU has 79"},
    )
    lines = report.rows(found)
    text = report.table(lines, found)
    assert max(map(len, text.splitlines())) <= 80
    for row in lines:
        assert row.what in text, row
    assert "41.44" in text  # 15,000 tokens/s beside 362


def test_a_failed_part_is_a_missed_target_with_its_reason() -> None:
    found = result(stock={"failed": "ValueError: something"})
    assert missed(found) == ["stock: failed"]
    assert "ValueError: something" in load("_report").table(load("_report").rows(found), found)
