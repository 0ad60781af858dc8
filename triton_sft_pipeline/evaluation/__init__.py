"""Evaluation: does the tuned model write better kernels than the base model, and on which problems?

`generation` asks a loaded model and `server` a served one, the judge of `verification` decides, `scores` counts,
`evaluate` runs it and goes on where a killed run was, `summary` makes a report of it, `report` draws that. Importing
this package imports no heavy library.
"""

from triton_sft_pipeline.evaluation.evaluate import evaluate
from triton_sft_pipeline.evaluation.generation import Asker, Completion, LocalAsker, Request, generate
from triton_sft_pipeline.evaluation.report import (
    fast_p_plot_png,
    render_html,
    render_markdown,
    score_plot_png,
    write_report,
)
from triton_sft_pipeline.evaluation.settings import EvaluationSettings
from triton_sft_pipeline.evaluation.summary import scores_hash

__all__ = [
    "Asker",
    "Completion",
    "EvaluationSettings",
    "LocalAsker",
    "Request",
    "evaluate",
    "fast_p_plot_png",
    "generate",
    "render_html",
    "render_markdown",
    "score_plot_png",
    "scores_hash",
    "write_report",
]
