"""Kernels that a judge must refuse: every kind of attack and mistake, each in several variants.

A cheat that takes something from its surroundings (a secret, the expected output) is right when it finds it and raises
or gives zeros when it does not, so that a verdict of "verified" always means that the attack works. Knows nothing of
how the judge finds out.
"""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.cheats import (
    broken,
    disguises,
    elsewhere,
    endings,
    fallbacks,
    forgeries,
    memory,
    outputs,
    patches,
    resources,
    smuggled,
    spying,
    values,
)
from triton_sft_pipeline_tests.verification.snippets import Case

# The kinds that every judge of kernels must know, as a check that none of them lost its cases.
KINDS = frozenset(
    {
        "another dtype",
        "another shape",
        "another structure",
        "beyond the interpreter",
        "broken code",
        "caching",
        "computing elsewhere",
        "constant output",
        "copy-through kernel",
        "deleting files",
        "dummy launch",
        "endless",
        "exiting",
        "forged result",
        "fork bomb",
        "hidden from the judge",
        "huge allocation",
        "lazy output",
        "left running",
        "mutated input",
        "network",
        "no launch",
        "non-finite output",
        "other values",
        "output alias",
        "output flood",
        "partial fallback",
        "patched launch",
        "patched surroundings",
        "reading the reference",
        "replaced modules",
        "returning the input",
        "right for some inputs",
        "right once",
        "secrets",
        "side stream",
        "uninitialised memory",
    }
)

CHEATS: tuple[Case, ...] = (
    *fallbacks.CASES,
    *disguises.CASES,
    *elsewhere.CASES,
    *memory.CASES,
    *values.CASES,
    *outputs.CASES,
    *patches.CASES,
    *endings.CASES,
    *forgeries.CASES,
    *resources.CASES,
    *spying.CASES,
    *smuggled.CASES,
    *broken.CASES,
)
