"""Experts in 4 bits, from the float ones that a test made."""

from __future__ import annotations

from triton_sft_pipeline.training.experts import nf4
from triton_sft_pipeline.training.experts.module import PROJECTIONS, PackedExperts


def pack_in_place(experts: PackedExperts) -> None:
    """Pack float parameters, one expert at a time, on the device they lie on."""
    for name in PROJECTIONS:
        weights = experts.get_parameter(name).data
        for expert in range(experts.num_experts):
            experts.install(name, expert, nf4.pack(weights[expert], experts.quant_type, experts.double_quant))
