"""One evaluation, run once, that the tests of this room read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from triton_sft_pipeline.evaluation import EvaluationSettings, LocalAsker, evaluate
from triton_sft_pipeline.problems import Problem
from triton_sft_pipeline_tests.evaluation.models import RecordingJudge, ScriptedModel, byte_tokenizer

CODE = "import torch.nn as nn\n\n\nclass Model(nn.Module):\n    def forward(self, {0}):\n        return {0} + 1\n"
HOSTILE = '</pre></details><script>alert("x & y")</script><img src="http://evil.example/a.png">'


class Evaluation(NamedTuple):
    report: dict[str, Any]
    directory: Path
    judge: RecordingJudge
    model: ScriptedModel
    steps: list[tuple[int, int]]


def problem(key: str) -> Problem:
    return Problem(key=key, pytorch_code=CODE.format(key), source="hand-written")


def written(code: str) -> str:
    return f"Short.\n</think>\n\n<triton>\n{code}\n</triton>"


SPLITS = {
    "seen": [problem("seen_a"), problem("seen_b")],
    "test": [problem("test_a")],
    "held_out": [problem("held_a"), problem("held_b"), problem("held_c")],
}

ANSWERS = {
    ("seen_a", False): "no kernel here",
    ("seen_b", False): "",
    ("test_a", False): written("def right(): pass"),
    ("held_a", False): written("def right(): pass"),
    ("held_b", False): f"<b>{HOSTILE}",
    ("held_c", False): written("reference breaks"),
    ("seen_a", True): written("def right(): pass"),
    ("seen_b", True): "</think>\n```python\ndef right(): pass\n```",
    ("test_a", True): written("wrong shape"),
    ("held_a", True): written(f"# {HOSTILE}\nwrong shape"),
    ("held_b", True): written("def right(): return 'é' < \"x\""),
    ("held_c", True): written("reference breaks"),
}

VERDICTS = {"wrong shape": "incorrect_shape", "reference breaks": "reference_error"}


def run(
    directory: Path,
    has_adapter: bool = True,
    splits: Any = None,
    judge: RecordingJudge | None = None,
    **settings: Any,
) -> Evaluation:
    tokenizer = byte_tokenizer()
    model = ScriptedModel(tokenizer, ANSWERS)
    judge = judge or RecordingJudge(VERDICTS)
    steps: list[tuple[int, int]] = []
    asked = EvaluationSettings(max_new_tokens=400, **settings)
    report = evaluate(
        LocalAsker(model, tokenizer, asked, has_adapter),
        SPLITS if splits is None else splits,
        asked,
        judge=judge,
        out_dir=directory,
        provenance={"preset": "tiny", "adapter": {"hash": "ab" * 32}, "notes": ["The base had read the fragments."]},
        progress=lambda done, total, note="": steps.append((done, total)),
    )
    return Evaluation(report, directory, judge, model, steps)


@pytest.fixture(scope="session")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return run(tmp_path_factory.mktemp("evaluation"))
