"""The table that the judge's benchmark prints: every figure beside the bound that the project holds it to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

WIDTH = 80
_COLUMNS = (14, 11, 6)

CPU_PER_MINUTE = 100.0
CPU_MEDIAN_S = 0.5
CPU_TIMES = 3.0
GPU_TIMES = 5.0
REPEAT_SHARE = 0.98
HANG_LATE_S = 1.0


@dataclass(frozen=True)
class Row:
    """A line of the table: what, how much, the bound as text, and whether it is met (None: there is no bound)."""

    what: str
    value: str
    bound: str = ""
    met: bool | None = None


def rows(result: Mapping[str, Any]) -> list[Row]:
    """The lines for the parts that ran, in their order."""
    makers = {"rate": _rate, "yardstick": _yardstick, "aa": _against_itself, "repeat": _repeat, "hang": _hang}
    found: list[Row] = []
    for part, maker in makers.items():
        figures = result.get(part)
        if figures and "skipped" in figures:
            found.append(Row(part, "skipped", figures["skipped"]))
        elif figures:
            found.extend(maker(figures, result))
    return found


def table(lines: list[Row], result: Mapping[str, Any]) -> str:
    """The lines with a heading that says where they were measured; no line is wider than 80 columns."""
    about, options = result["about"], result["options"]
    where = (about.get("gpu") or {}).get("name", "GPU") if options["device"] == "cuda" else "CPU interpreter"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name != "numpy")
    heading = [
        f"{where}, {about['processors']} processors, {options['workers']} at once, {options['trials']} trials",
        versions,
        "",
        _line("", "measured", "bound", ""),
        "-" * WIDTH,
    ]
    body = [_line(row.what, row.value, row.bound, {True: "ok", False: "MISSED", None: ""}[row.met]) for row in lines]
    return "\n".join(line[:WIDTH] for line in heading + body)


def _line(what: str, value: str, bound: str, met: str) -> str:
    first, second, third = _COLUMNS
    figures = f"{value:>{first}} {bound:>{second}} {met:<{third}}"
    room = WIDTH - 1 - len(figures)
    return f"{what[:room]:<{room}} {figures}".rstrip()


def _rate(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    cpu = result["options"]["device"] == "cpu"
    yield Row(f"rate: kernels executed, of {figures['kernels']}", str(figures["executed"]))
    per_minute = figures["kernels_per_minute"]
    name = f"  kernels a minute{', timed' if figures['timing'] else ''}, start included"
    yield (
        Row(name, f"{per_minute:.1f}", f">= {CPU_PER_MINUTE:g}", per_minute >= CPU_PER_MINUTE)
        if cpu
        else Row(name, f"{per_minute:.1f}")
    )
    yield Row(
        f"  without the start of {figures['start_s']:.1f} s", f"{figures['kernels_per_minute_without_start']:.1f}"
    )
    median = figures["median_wall_s"]
    yield (
        Row("  one kernel, median", _seconds(median), f"<= {CPU_MEDIAN_S:g} s", median <= CPU_MEDIAN_S)
        if cpu and median is not None
        else Row("  one kernel, median", _seconds(median))
    )
    yield Row("  one kernel, 95 % are below", _seconds(figures["p95_wall_s"]))
    yield Row("  GPU busy", _share(figures["gpu_busy"]))
    yield Row("  ran out of time", str(figures["timeouts"]))
    labels = figures["labels"]
    yield Row("  agree with the label on correctness", f"{labels['agree']} of {labels['labelled']}")
    yield Row("  isolation", ", ".join(figures["isolation"]))
    for verdict, count in figures["verdicts"].items():
        yield Row(f"  {verdict}", str(count))


def _yardstick(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    yield Row(f"yardstick: kernels executed, of {figures['kernels']}", str(figures["executed"]))
    per_minute = figures["kernels_per_minute"]
    yield Row("  kernels a minute", f"{per_minute:.1f}")
    yield Row("  one kernel, median", _seconds(figures["median_wall_s"]))
    yield Row("  GPU busy", _share(figures["gpu_busy"]))
    yield Row("  ran out of time", str(figures["timeouts"]))
    judge = result.get("rate")
    if not judge or not per_minute:
        return
    bound = CPU_TIMES if result["options"]["device"] == "cpu" else GPU_TIMES
    times = judge["kernels_per_minute"] / per_minute
    # Correctness alone on a GPU has no bound of its own.
    bounded = result["options"]["device"] == "cpu" or judge["timing"]
    yield Row(
        "  the judge is so many times as fast", f"{times:.1f}", *((f">= {bound:g}", times >= bound) if bounded else ())
    )
    common = figures["common"]
    if common["times"] is not None:
        yield Row(f"  on the {common['kernels']} that neither ran out of time for", f"{common['times']:.1f}")


def _against_itself(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    everything = figures["all"]
    yield Row(f"A/A: against themselves, timed of {everything['runs']}", *_of(everything))
    flagged = everything["flagged"]
    yield Row("  flagged as faster", str(flagged), "0", flagged == 0)
    yield Row("  whole interval below 1 (slower)", str(everything["flagged_slower"]))
    for name, case in {"all": everything, **figures["cases"]}.items():
        if case["measured"]:
            yield Row(f"  {name}: {case['kernel_ms']:.4f} ms: min, median, max", *_three(case["speedup"]))
            yield Row("    width of the interval: median, max", *_two(case["width"]))


def _of(case: Mapping[str, Any]) -> tuple[str, str, bool]:
    return str(case["measured"]), "all", case["measured"] == case["runs"]


def _three(values: Mapping[str, float | None]) -> tuple[str, str]:
    return f"{_number(values['min'])} {_number(values['median'])}", _number(values["max"])


def _two(values: Mapping[str, float | None]) -> tuple[str, str]:
    return _number(values["median"]), _number(values["max"])


def _repeat(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    free, everything = figures["not_launch_bound"], figures["all"]
    share = free["share"]
    yield Row(
        f"repeat: fast_1, {free['agree']} of {free['kernels']} not launch bound",
        _share(share),
        f">= {REPEAT_SHARE:.0%}",
        share is not None and share >= REPEAT_SHARE,
    )
    yield Row(f"  all: {everything['agree']} of {everything['kernels']}", _share(everything["share"]))
    for item in figures["disagreements"]:
        mark = "" if item["not_launch_bound"] else " (launch bound)"
        yield Row(f"  {item['name'][:26]}{mark}", _bracket(item["runs"][0]), _bracket(item["runs"][1]))
    for item in figures["other_verdicts"]:
        yield Row(f"  {item['name'][:40]}", "")
        yield from (Row(f"    {verdict}", "") for verdict in item["verdicts"])


def _bracket(run: Mapping[str, Any]) -> str:
    return f"{_number(run['low'], 2)}-{_number(run['high'], 2)}"


def _hang(figures: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Row]:
    worst = figures["worst_late_s"]
    yield Row(
        f"hang: limit to verdict, longest of {len(figures['runs'])}",
        _seconds(worst),
        f"<= {HANG_LATE_S:g} s",
        worst <= HANG_LATE_S,
    )
    for where in dict.fromkeys(run["where"] for run in figures["runs"]):
        late = [run["late_s"] for run in figures["runs"] if run["where"] == where]
        yield Row(f"  {where}, longest", _seconds(max(late)))
    yield Row("  hangs with the verdict timeout", *_all_timeouts(figures))
    honest = figures["honest"]
    # A judge that calls everything a timeout, or is broken by a hang, must not pass.
    right = all(verdict.startswith("verified") for verdict in honest)
    yield Row("  honest kernel before and after", honest[0] if len(set(honest)) == 1 else " ".join(honest), "", right)


def _all_timeouts(figures: Mapping[str, Any]) -> tuple[str, str, bool]:
    count = len(figures["runs"]) - len(figures["not_timeout"])
    return str(count), str(len(figures["runs"])), not figures["not_timeout"]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
