"""Evaluation: does the tuned model write better kernels than the base model, and on which problems?

`generation` asks, the judge of `verification` decides, `scores` counts, `evaluate` runs it, `summary` makes a report of
it, `report` draws that. Importing this package imports no heavy library.
"""

from triton_sft_pipeline.evaluation.evaluate import evaluate
from triton_sft_pipeline.evaluation.generation import Completion, generate
from triton_sft_pipeline.evaluation.report import render_html, render_markdown, score_plot_png, write_report
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.evaluation.summary import scores_hash

__all__ = [
    "Completion",
    "EvaluationSettings",
    "evaluate",
    "generate",
    "render_html",
    "render_markdown",
    "score_plot_png",
    "scores_hash",
    "write_report",
]
