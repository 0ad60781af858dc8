"""What a problem is: a PyTorch module with inputs, in KernelBench's format.

Loads problems (`loading` all or none, `reading` whatever can be asked, from files or the Hub), tells whether two are
the same (`fingerprints`) or alike (`likeness`), what kind of operator one is about (`families`) and what it would have
to download (`weights`). Importing this package imports no heavy library.
"""

from triton_sft_pipeline.problems.families import FAMILIES, family_of
from triton_sft_pipeline.problems.fingerprints import fingerprint, hash_problems
from triton_sft_pipeline.problems.loading import Problem, load_problems
from triton_sft_pipeline.problems.reading import KERNELBENCH_LEVELS, ProblemSet, Unusable, every_problem, read_problems

__all__ = [
    "FAMILIES",
    "KERNELBENCH_LEVELS",
    "Problem",
    "ProblemSet",
    "Unusable",
    "every_problem",
    "family_of",
    "fingerprint",
    "hash_problems",
    "load_problems",
    "read_problems",
]
