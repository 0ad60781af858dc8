"""Made-up reports of any size, with numbers that belong to their answers: what the drawings and comparisons are tested
with. No model and no judge is asked.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from math import exp
from typing import Any

from triton_sft_pipeline.evaluation import scores

MODELS = ("base", "tuned")
SPLITS = ("seen", "test", "held_out", "touched")
FAMILIES = ("matrix product", "convolution", "element-wise", "reduction", "normalisation", "other")
BAD = ("incorrect_numerical", "compile_error", "unparsed", "torch_fallback", "syntax_error", "runtime_error")

PYTORCH = '''import torch
import torch.nn as nn


class Model(nn.Module):
    """Number {i}: a scaled sum over the last dimension."""

    def __init__(self, scale: float = {i}.5):
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.scale).sum(dim=-1)  # one row, one number


def get_inputs():
    return [torch.randn(128, 1024)]


def get_init_inputs():
    return [{i}.5]
'''

KERNEL = """import torch
import triton
import triton.language as tl


@triton.jit
def scaled_sum_kernel(x_ptr, out_ptr, columns, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    values = tl.load(x_ptr + row * columns + offsets, mask=offsets < columns, other=0.0)
    tl.store(out_ptr + row, tl.sum(values * scale, axis=0))


def triton_kernel_wrapper(x, scale={i}.5):
    # {note}
    out = torch.empty(x.shape[:-1], device=x.device, dtype=x.dtype)
    scaled_sum_kernel[(x.shape[0],)](x, out, x.shape[-1], scale, BLOCK=triton.next_power_of_2(x.shape[-1]))
    return out
"""


def answer(verdict: str = "verified", sample: int = 0, speedup: float | None = None, **fields: Any) -> dict[str, Any]:
    """One answer of a report; `fields` replace what follows from the verdict."""
    good = verdict.startswith("verified")
    parsed = verdict != "unparsed"
    code = KERNEL.format(i=sample, note=f"written as number {sample}") if parsed else None
    return {
        "sample": sample,
        "verdict": verdict,
        "correctness": good,
        "detail": f"The judge found {verdict.replace('_', ' ')} in answer {sample}.",
        "speedup": speedup,
        "speedup_low": speedup and speedup * 0.94,
        "speedup_high": speedup and speedup * 1.07,
        "compile_speedup": None,
        "graph_speedup": None,
        "launch_bound": None,
        "reference_time_ms": speedup and 0.2,
        "reference_iqr_ms": speedup and 0.01,
        "kernel_time_ms": speedup and 0.2 / speedup,
        "kernel_iqr_ms": speedup and 0.01,
        "torch_share": 0.0,
        "code": code,
        "answer": f"Let me think about the rows first.\n</think>\n\n<triton>\n{code}\n</triton>" if parsed else "Hm. ",
        "tokens": 400 + 10 * sample,
        "stopped": "stop" if parsed else "length",
        "fast_1": good and speedup * 0.94 > 1 if speedup else None,
        "fast_2": good and speedup * 0.94 >= 2 if speedup else None,
        **fields,
    }


def problem(key: str, split: str, number: int = 1, **fields: Any) -> dict[str, Any]:
    """One problem of a report, without answers unless `fields` bring them."""
    return {
        "key": key,
        "split": split,
        "source": "made up",
        "level": 3 if number % 2 else 4,
        "family": FAMILIES[number % len(FAMILIES)],
        "name": key.rpartition("/")[2],
        "pytorch_code": PYTORCH.format(i=number),
        "touched": "It is the problem train_7 of the training data, word for word." if split == "touched" else None,
        **fields,
    }


def made_problems(
    sizes: Mapping[str, int], samples: int = 1, tuned: bool = True, timed: bool = True, seed: int = 0
) -> list[dict[str, Any]]:
    """Problems with drawn answers; the tuned model is the better one, and surest on the seen problems."""
    draw = random.Random(seed)
    rows = []
    for split, size in sizes.items():
        for number in range(size):
            row = problem(f"level{3 + number % 2}/{number}_{split}_problem", split, number)
            for model in MODELS if tuned else MODELS[:1]:
                chance = {"base": 0.08, "tuned": 0.9 if split == "seen" else 0.4}[model]
                row[model] = [_drawn(draw, sample, chance, timed) for sample in range(samples)]
            rows.append(row)
    return rows


def _drawn(draw: random.Random, sample: int, chance: float, timed: bool) -> dict[str, Any]:
    good = draw.random() < chance
    speed = exp(draw.gauss(0.15, 0.6)) if good and timed else None
    return answer("verified" if good else draw.choice(BAD), sample, speed)


def made_report(problems: Sequence[Mapping[str, Any]], *, timed: bool = True, **parts: Any) -> dict[str, Any]:
    """A whole report of these problems in schema 2; `parts` replace whole entries of it."""
    models = [model for model in MODELS if model == "base" or any(model in row for row in problems)]
    samples = max((len(row["base"]) for row in problems), default=1)
    report: dict[str, Any] = {
        "schema_version": 2,
        "headline": "verified kernels: made up",
        "notes": ["Every number here is made up."],
        **{m: {s: score([r[m] for r in problems if r["split"] == s], timed) for s in SPLITS} for m in models},
        "groups": {s: _groups([r for r in problems if r["split"] == s], models, timed) for s in SPLITS},
        "comparison": {},
        "unusable": [],
        "problems": list(problems),
        "generation": {m: _generation([a for r in problems for a in r[m]]) for m in models},
        "judge": {"device": "cuda", "backend": "cuda", "trials": 5, "versions": {"triton": "3.7.1", "torch": "2.13.0"}},
        "settings": {"samples": samples, "temperature": 0.7 if samples > 1 else 0.0, "top_p": 0.95, "seed": 0},
        "provenance": {
            "preset": "tiny",
            "adapter_version": "ab" * 32,
            "device": "a made-up device",
            "judge_version": "3",
            "repeat_with": "triton-sft evaluate --preset tiny --problems problems/ --out report/",
        },
    }
    report["groups"] = {split: groups for split, groups in report["groups"].items() if groups["level"]}
    if "tuned" in models:
        report["comparison"] = {s: comparison([r for r in problems if r["split"] == s], timed) for s in SPLITS}
    return {**report, **parts}


def score(groups: Sequence[Sequence[Mapping[str, Any]]], timed: bool) -> dict[str, Any]:
    """A Score of some problems' answers. Few resamples: how far an interval reaches is tested elsewhere."""
    return scores.score([scores.outcomes(answers) for answers in groups], timed=timed, resamples=200)


def comparison(problems: Sequence[Mapping[str, Any]], timed: bool) -> dict[str, Any]:
    """A Comparison of the two models of some problems."""
    sides = [[scores.outcomes(row[model]) for row in problems] for model in MODELS]
    return scores.compare(*sides, timed=timed, resamples=200)


def _groups(rows: Sequence[Mapping[str, Any]], models: Iterable[str], timed: bool) -> dict[str, Any]:
    models = list(models)

    def by(name: str) -> dict[str, Any]:
        keys = sorted({str(row[name] or "unknown") for row in rows})
        return {
            key: {m: score([r[m] for r in rows if str(r[name] or "unknown") == key], timed) for m in models}
            for key in keys
        }

    return {"level": by("level"), "family": by("family")}


def _generation(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tokens = sum(a["tokens"] for a in answers)
    return {
        "answers": len(answers),
        "tokens": tokens,
        "seconds": tokens / 500,
        "tokens_per_second": 500.0 if tokens else None,
        "stopped": {"stop": sum(a["stopped"] == "stop" for a in answers)},
    }
