"""The whole way for real: traces are filtered, a model is trained, reloaded and asked, and its kernels are run. Nothing
is recorded or faked.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from triton_sft_pipeline_tests.pipeline.harness import sample_traces

pytestmark = pytest.mark.slow

STOCK = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert not [name for name in sys.modules if name.startswith("triton_sft_pipeline")]
print(sum("lora_" in name for name, _ in model.named_parameters()), len(tokenizer))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with six traces: five that are kept, one that is not."""
    home = tmp_path_factory.mktemp("home")
    traces = sample_traces()
    kept = sorted(
        (t for t in traces if t.get("result") and t["result"]["correctness"]), key=lambda t: len(t["triton_code"])
    )[:5]
    (home / "traces.json").write_text(
        json.dumps([*kept, next(t for t in traces if t.get("result") and not t["result"]["correctness"])])
    )
    (home / "settings.yaml").write_text(
        "filter: {min_traces: 5}\ntraining: {max_steps: 60, eval_steps: 30, save_steps: 30}\n"
    )
    return home


def run(home: Path, *arguments: str, expect: int = 0) -> str:
    environment = os.environ | {
        "TRITON_SFT_HOME": str(home / "storage"),
        "TRITON_SFT_TRACES": str(home / "traces.json"),
        "TRITON_SFT_CONFIG": str(home / "settings.yaml"),
        "DAGSTER_HOME": str(home / "dagster"),
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=home)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def refresh(home: Path, *options: str) -> str:
    return run(home, "-m", "triton_sft_pipeline.cli", "refresh", *options)


@pytest.fixture(scope="module")
def refreshed(home: Path) -> str:
    return refresh(home)


def test_the_tuned_model_writes_kernels_that_hold_where_the_base_writes_none(home: Path, refreshed: str) -> None:
    report = json.loads((home / "storage/evaluation_report/current/report.json").read_text())
    assert report["headline"] in refreshed
    assert report["base"]["seen"]["fast_0"]["count"] == 0
    assert report["tuned"]["seen"]["n"] == 4
    assert report["tuned"]["seen"]["fast_0"]["count"] >= 3
    assert report["comparison"]["seen"]["wins"] >= 3 and report["comparison"]["seen"]["losses"] == 0
    assert report["tuned"]["held_out"]["n"] == report["base"]["held_out"]["n"] == 10


def test_the_adapter_loads_with_stock_peft_alone(home: Path, refreshed: str) -> None:
    adapter = home / "storage/lora_adapter/current"
    tensors, tokens = run(home, "-c", STOCK, str(adapter)).split()[-2:]
    assert int(tensors) > 0
    assert int(tokens) > 0
    assert list(adapter.glob("runs/events.out.tfevents.*")), "TensorBoard events are kept with the adapter"


def test_a_second_refresh_finds_nothing_to_do(home: Path, refreshed: str) -> None:
    assert "Nothing to do" in refresh(home)


def test_infer_answers_with_reasoning_and_a_kernel(home: Path, refreshed: str) -> None:
    report = json.loads((home / "storage/evaluation_report/current/report.json").read_text())
    known = next(p for p in report["problems"] if p["split"] == "seen" and p["tuned"][0]["correctness"])
    (home / "problem.py").write_text(known["pytorch_code"])
    answer = run(home, "-m", "triton_sft_pipeline.cli", "infer", "problem.py", "--out", "kernel.py")
    assert answer.startswith("<think>")
    assert "</think>" in answer
    assert "<triton>" in answer
    assert "triton_kernel_wrapper" in (home / "kernel.py").read_text()


def test_an_edited_trace_makes_the_filter_stale_and_says_what_would_follow(home: Path, refreshed: str) -> None:
    traces = json.loads((home / "traces.json").read_text())
    original = json.dumps(traces)
    traces[0]["model_reasoning"] += " Masked at the end."
    (home / "traces.json").write_text(json.dumps(traces))
    said = refresh(home, "--dry-run")
    (home / "traces.json").write_text(original)
    assert "would run filtered_traces" in said
    assert "would run lora_adapter if what is above it comes out different" in said
