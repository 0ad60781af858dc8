"""What a problem is: a PyTorch module with inputs, in KernelBench's format.

Loads problems and tells whether two are the same.
"""

from triton_sft_pipeline.problems.fingerprints import fingerprint, hash_problems
from triton_sft_pipeline.problems.loading import Problem, load_problems

__all__ = ["Problem", "fingerprint", "hash_problems", "load_problems"]
