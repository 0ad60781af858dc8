"""Memory that is rightly kept or reused: scratch space, packed weights, fresh outputs from empty memory."""

from __future__ import annotations

from triton_sft_pipeline_tests.verification.snippets import (
    CALL,
    DOUBLE,
    HEADER,
    LAUNCH,
    Case,
    kernel,
    pointwise_kernel,
    problem,
    wrapper,
)

EITHER = frozenset({"verified", "verified_hybrid"})

SCALE_KERNEL = """
@triton.jit
def scale(x_ptr, w_ptr, y_ptr, n, columns, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    w = tl.load(w_ptr + offsets % columns, mask=mask)
    tl.store(y_ptr + offsets, x * w, mask=mask)

"""
_SCALED = problem("x * self.gain", init="self.gain = nn.Parameter(torch.randn(8))")


def _case(name: str, code: str, pytorch_code: str = DOUBLE, verdicts: frozenset[str] = frozenset({"verified"})) -> Case:
    return Case(name, "memory", pytorch_code, code, verdicts)


CASES = (
    _case("an output from zeros", pointwise_kernel("x * 2", output="torch.zeros_like(x)")),
    _case("an output from full", pointwise_kernel("x * 2", output="torch.full_like(x, 7.0)")),
    _case("an output from empty memory with more room", pointwise_kernel("x * 2", "torch.empty(64)[:32].view(4, 8)")),
    _case("an output by the old constructor", pointwise_kernel("x * 2", "torch.Tensor(4, 8)")),
    _case(
        "scratch space that is kept between calls",
        kernel(
            f"z = SCRATCH.setdefault(x.shape, torch.empty_like(x))\ny = z\n{LAUNCH}\nx = z\ny = torch.empty_like(x)\n"
            f"{LAUNCH}\nreturn y",
            prelude="SCRATCH = {}\n",
        ),
        problem("x * 4"),
    ),
    _case(
        "a packed weight that is kept by its id",
        HEADER
        + SCALE_KERNEL
        + "\nPACKED = {}\n"
        + wrapper(
            """
            if id(gain) not in PACKED:
                PACKED[id(gain)] = (gain, gain.detach().clone().contiguous())
            y = torch.empty_like(x)
            scale[(1,)](x, PACKED[id(gain)][1], y, x.numel(), 8, BLOCK=32)
            return y
            """,
            "x, gain",
        ),
        _SCALED,
        EITHER,
    ),
    _case(
        "a packed weight that is kept in a ModelNew",
        HEADER
        + SCALE_KERNEL
        + """
class ModelNew(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(8))
        self.packed = None

    def forward(self, x):
        if self.packed is None:
            self.packed = self.gain.data.reshape(1, -1).contiguous()
        y = torch.empty_like(x)
        scale[(1,)](x, self.packed, y, x.numel(), 8, BLOCK=32)
        return y
""",
        _SCALED,
        EITHER,
    ),
    _case(
        "settings that are kept by shape",
        kernel(
            """
            if x.shape not in SETTINGS:
                SETTINGS[x.shape] = min(64, triton.next_power_of_2(x.numel()))
            y = torch.empty_like(x)
            pointwise[(1,)](x, y, x.numel(), BLOCK=SETTINGS[x.shape])
            return y
            """,
            prelude="SETTINGS = {}\n",
        ),
    ),
    _case(
        "settings that functools keeps",
        kernel(
            CALL.replace("BLOCK=32", "BLOCK=block_size(32)"),
            prelude="import functools\n\n@functools.lru_cache(maxsize=None)\ndef block_size(n):\n    return n\n",
        ),
    ),
    _case(
        "a loop over rows with a launch for each",
        kernel(
            "y = torch.empty_like(x)\nfor index in range(x.shape[0]):\n"
            "    pointwise[(1,)](x[index], y[index], x.shape[1], BLOCK=32)\nreturn y"
        ),
    ),
    _case(
        "a padded buffer that the kernel fills in part and the output leaves out",
        kernel(
            "y = torch.empty(40)\npointwise[(1,)](x, y, x.numel(), BLOCK=32)\nreturn y[:32].view(4, 8)",
        ),
    ),
)
