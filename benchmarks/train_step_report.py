"""The table that the training benchmark prints: every figure beside the target that the project holds it to."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

WIDTH = 80
_COLUMNS = (14, 13, 6)

CAP_STEPS = 50
NOISE_TIMES = 2.0


@dataclass(frozen=True)
class Target:
    """What a preset has to reach with sequences of `seq` tokens, one at a time, in all layers of Trinity-Mini.

    Attributes:
        tokens_per_s: at least, on one H200; None: no target.
        peak_gib: at most, reserved by torch.
        cap_gib: the largest cap on the process under which `CAP_STEPS` steps have to pass; None: no target.
    """

    seq: int
    tokens_per_s: float | None
    peak_gib: float
    cap_gib: float | None = None


TARGETS = {
    "trinity-mini-24gb": Target(4096, 14_500.0, 21.0, 22.3),
    "trinity-mini": Target(4096, 10_000.0, 34.0),
    "trinity-mini-16k": Target(16_384, None, 40.0),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: what, how much, the target as text, and whether it is met (None: there is none)."""

    what: str
    value: str = ""
    bound: str = ""
    met: bool | None = None


def target_of(result: Mapping[str, Any]) -> Target | None:
    """The target that holds for what was asked; None for another shape, fewer layers, other sizes or no GPU."""
    asked = result["options"]
    target = TARGETS.get(asked["preset"])
    right = asked["shape"] == "trinity-mini" and asked["layers"] is None and asked["batch"] == 1
    if target is None or not right or asked["seq"] != target.seq or not result["about"]["gpu"]:
        return None
    return target


def rows(result: Mapping[str, Any]) -> list[Row]:
    """The lines for the parts that ran, in their order."""
    makers = {
        "step": _step,
        "one_gpu": _one_gpu,
        "profile": _profile,
        "plain": _plain,
        "curves": _curves,
        "loop": _loop,
        "stock": _stock,
    }
    found: list[Row] = []
    for part, maker in makers.items():
        figures = result.get(part)
        if figures and "skipped" in figures:
            found.append(Row(f"{part}: skipped"))
            found.extend(_sentence(figures["skipped"]))
        elif figures and "failed" in figures and "steps_done" not in figures:
            found.append(Row(f"{part}: failed", met=False))
            found.extend(_sentence(figures["failed"]))
        elif figures:
            found.extend(maker(figures, result))
    return found


def table(lines: list[Row], result: Mapping[str, Any]) -> str:
    """The lines with a heading that says what was measured where; no line is wider than 80 columns."""
    about, asked = result["about"], result["options"]
    gpu = about.get("gpu") or {"name": "no GPU"}
    names = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes")
    versions = [f"{name} {about['versions'][name]}" for name in names if name in about["versions"]]
    layers = "all" if asked["layers"] is None else f"the first {asked['layers']}"
    heading = [
        f"{gpu['name']}, driver {gpu['driver']}" if "driver" in gpu else gpu["name"],
        ", ".join(versions[:3]),
        ", ".join(versions[3:]) + (f", commit {about['commit']}" if about.get("commit") else ""),
        f"{asked['preset']}: {asked['shape']}, {layers} layers, {asked['batch']} x {asked['seq']} tokens, "
        f"{asked['accumulation']} accumulated",
        *([f"the loss leaves out the first {asked['prompt_share']:.0%}"] if asked["prompt_share"] else []),
        "",
        _line(Row("", "measured", "target")),
        "-" * WIDTH,
    ]
    return "\n".join(line[:WIDTH] for line in [*heading, *map(_line, lines)])


def _line(row: Row) -> str:
    first, second, third = _COLUMNS
    verdict = {True: "ok", False: "MISSED", None: ""}[row.met]
    figures = f"{row.value:>{first}} {row.bound:>{second}} {verdict:<{third}}"
    if not row.value and not row.bound and not verdict:
        return row.what
    room = WIDTH - 1 - len(figures)
    return f"{row.what[:room]:<{room}} {figures}".rstrip()


def _sentence(text: str) -> Iterator[Row]:
    """A sentence on as many lines as it takes, four of them at most."""
    words, line, count = text.split(), "", 0
    for word in words:
        if len(line) + len(word) > WIDTH - 4 and line:
            yield Row(f"  {line}")
            line, count = "", count + 1
            if count == 4:
                return
        line = f"{line} {word}".strip()
    yield Row(f"  {line}")


def _step(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    target = target_of(result)
    gpus = figures["gpus"]
    yield from _rate(f"tokens/s on {gpus} GPU{'s' if gpus > 1 else ''}", figures, _speed_target(result, target))
    if share := figures.get("share"):
        flops = figures["flops_a_token"]
        yield Row("  bf16 matmul of 8192 cubed, TFLOP/s", f"{figures['ceiling_tflops']:,.1f}")
        yield Row(f"  share of that at {flops['model'] / 1e9:.1f} GFLOP a token", f"{share['model']:.1%}")
        yield Row(f"    with recomputation, {flops['executed'] / 1e9:.1f} GFLOP", f"{share['executed']:.1%}")
    yield from _memory(figures, target)
    yield from _cap(figures, target)
    yield Row("  GiB once built, peak while building", *_built(figures))
    yield Row("  adapter weights trained", f"{figures['trainable_parameters']:,}")
    fused = figures["fused"]
    yield Row("  fused layers, passes through them", str(fused["layers"]), str(fused["passes"]))
    if figures["losses"]:
        yield Row("  loss, first and last logged", *_ends(figures["losses"]))


def _speed_target(result: Mapping[str, Any], target: Target | None) -> float | None:
    """The target of the H200; other GPUs have none."""
    if target is None or result["options"]["gpus"] > 1 or "H200" not in result["about"]["gpu"]["name"]:
        return None
    return target.tokens_per_s


def _rate(name: str, figures: Mapping[str, Any], at_least: float | None = None) -> Iterator[Row]:
    rate, times = figures["tokens_per_s"], figures["step_s"]
    if at_least is not None:
        yield Row(name, _count(rate), f">= {at_least:,.0f}", rate is not None and rate >= at_least)
    else:
        yield Row(name, _count(rate))
    if times:
        yield Row(f"  step, median of {times['count']:.0f}", f"{times['median'] * 1e3:,.1f} ms")
        yield Row(
            "  step, a tenth is below and above", f"{times['p10'] * 1e3:,.1f} ms", f"{times['p90'] * 1e3:,.1f} ms"
        )
    if "failed" in figures:
        yield Row(f"  stopped after {figures['steps_done']} of {figures['steps_asked']} steps", met=False)
        yield from _sentence(figures["failed"])


def _memory(figures: Mapping[str, Any], target: Target | None = None) -> Iterator[Row]:
    found = figures["memory"]
    # Reserved, not allocated: what recorded graphs work in counts as allocated for none but them.
    peak = found["reserved_gib"]
    if peak is None:
        return
    if target is not None:
        yield Row("  peak GiB, reserved", f"{peak:.2f}", f"<= {target.peak_gib:g}", peak <= target.peak_gib)
    else:
        yield Row("  peak GiB, reserved", f"{peak:.2f}")
    used = found["gpu_used_gib"]
    yield Row("  GiB allocated; in use says nvidia-smi", f"{found['allocated_gib']:.2f}", _number(used, 2))
    yield Row("  allocations that had to be tried again", str(found["retries"]))


def _cap(figures: Mapping[str, Any], target: Target | None) -> Iterator[Row]:
    cap = figures["cap_gib"]
    if cap is None:
        return
    done, asked = figures["steps_done"], figures["steps_asked"]
    # Fewer steps than the target speaks of prove nothing, unless they failed.
    holds = target is not None and target.cap_gib is not None and cap <= target.cap_gib
    judged = holds and (asked >= CAP_STEPS or done < asked)
    yield Row(
        f"  steps that passed under a cap of {cap:g} GiB",
        f"{done} of {asked}",
        f">= {CAP_STEPS}" if holds else "",
        done >= CAP_STEPS if judged else None,
    )


def _built(figures: Mapping[str, Any]) -> tuple[str, str]:
    built = figures["built"]
    return _number(built.get("now_gib"), 2), _number(built["allocated_gib"], 2)


def _ends(values: list[float]) -> tuple[str, str]:
    return f"{values[0]:.4f}", f"{values[-1]:.4f}"


def _one_gpu(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    yield from _rate("the same on 1 GPU: tokens/s", figures)
    step = result.get("step") or {}
    if step.get("tokens_per_s") and figures["tokens_per_s"]:
        times = step["tokens_per_s"] / figures["tokens_per_s"]
        yield Row(f"  {step['gpus']} GPUs are so many times as fast", f"{times:.2f}")


def _profile(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    wall, busy = figures["wall_s"], figures["busy_s"]
    yield Row("one micro-batch and its optimiser step", f"{wall * 1e3:.1f} ms", "share")
    for name, found in sorted(figures["buckets"].items(), key=lambda item: -item[1]["seconds"]):
        what = f"  {name}, {found['launches']} launches"
        yield Row(what, f"{found['seconds'] * 1e3:.1f} ms", f"{found['seconds'] / wall:.1%}")
    yield Row("  the GPU ran something", f"{busy * 1e3:.1f} ms", f"{busy / wall:.1%}")
    yield Row("  the GPU was idle", f"{figures['idle_s'] * 1e3:.1f} ms", f"{figures['idle_s'] / wall:.1%}")
    yield Row("  launches", f"{figures['launches']:,}")
    spread = figures["tokens_an_expert"]
    yield Row("  tokens an expert: mean, most", f"{spread['mean']:.1f}", f"{spread['max']:.0f}")


def _plain(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    yield from _rate("plain layers (TRITON_SFT_PLAIN=1): tokens/s", figures)
    yield from _memory(figures)
    yield from _times(figures, result)


def _loop(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    yield from _rate("expert by expert, as before: tokens/s", figures)
    yield from _memory(figures)
    yield from _times(figures, result)


def _stock(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    yield from _rate("stock libraries, no dropout: tokens/s", figures)
    yield from _memory(figures)
    yield from _times(figures, result)


def _times(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    step = result.get("step") or {}
    if step.get("tokens_per_s") and figures["tokens_per_s"]:
        yield Row("  the project is so many times as fast", f"{step['tokens_per_s'] / figures['tokens_per_s']:.2f}")


def compared(fast: list[float], plain: list[float], other: list[float]) -> dict[str, float]:
    """How far the fused path's losses are from the plain path's, beside how far dropout alone moves those.

    Args:
        fast, plain: losses of every step on the same data, with the same first adapter and seed.
        other: those of the plain path with another dropout seed.
    """
    difference = [abs(a - b) for a, b in zip(fast, plain, strict=True)]
    noise = [abs(a - b) for a, b in zip(other, plain, strict=True)]
    return {
        "mean_difference": statistics.fmean(difference),
        "max_difference": max(difference),
        "mean_spread": statistics.fmean(noise),
        "max_spread": max(noise),
        "signed_difference": statistics.fmean(a - b for a, b in zip(fast, plain, strict=True)),
        "fallen": plain[0] - plain[-1],
    }


def _curves(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    found = figures["compared"]
    bound = NOISE_TIMES * found["mean_spread"]
    yield Row(f"losses of {figures['steps']} steps: fused against plain", "", "dropout alone")
    yield Row("  mean difference", f"{found['mean_difference']:.5f}", f"{found['mean_spread']:.5f}")
    yield Row("  largest difference", f"{found['max_difference']:.5f}", f"{found['max_spread']:.5f}")
    yield Row("  mean difference with its sign", f"{found['signed_difference']:+.5f}")
    yield Row("  plain loss, first and last", *_ends(figures["plain"]))
    met = found["mean_difference"] <= bound if figures["fused"]["passes"] else None
    yield Row(
        f"  mean within {NOISE_TIMES:g} times dropout's", f"{found['mean_difference']:.5f}", f"<= {bound:.5f}", met
    )


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
