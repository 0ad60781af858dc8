"""What a kernel is worth: whether it computes what its PyTorch module computes, and how much faster.

The docstring of `judge` says what is covered and what is not.
"""

from triton_sft_pipeline.verification.judge import KernelJudge
from triton_sft_pipeline.verification.verdict import JUDGE_VERSION, VERDICTS, JudgeItem, Verdict

__all__ = ["JUDGE_VERSION", "VERDICTS", "JudgeItem", "KernelJudge", "Verdict"]
