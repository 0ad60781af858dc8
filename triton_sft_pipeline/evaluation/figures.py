"""Figures of a report as inline SVG: fast_p curves, speedups, differences. Colours are classes that the page's style
sheet gives for light and dark; a series has the class of its model.

Pure: numbers in, markup out; every text is escaped. Sizes are in units of the drawing, which the page scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log2
from typing import Any

from markupsafe import Markup

from triton_sft_pipeline.evaluation.report_text import difference_text, percent, points

WIDTH = 460.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 14.0, 46.0
PLOT = 250.0
"""Height of the plot area of a curve."""
LANE = 112.0
"""Height of one model's lane of dots."""
LONGEST_NAME = 44
"""Letters of a name that the width of a lane has room for."""
DOT = 3.4
REACH = 118.0
"""Half the width of a difference's axis."""


@dataclass(frozen=True)
class Curve:
    """A fast_p curve: `points` is a Score's fast_p, `css` the class that gives it its colour."""

    name: str
    css: str
    points: Mapping[str, Any] | None


@dataclass(frozen=True)
class Lane:
    """Speedups of one model's verified kernels, each with what it is called, and a Score's speedup (their mean)."""

    name: str
    css: str
    kernels: Sequence[tuple[str, float]]
    mean: Mapping[str, Any] | None


def curve_top(curves: Sequence[Curve]) -> float:
    """The end of the vertical axis that holds every band: 0.25, 0.5 or 1. Curves that are compared share one."""
    highest = max((high for curve in curves for high in _known(curve, "high")), default=0.0)
    return next(top for top in (0.25, 0.5, 1.0) if highest <= top or top == 1.0)


def is_zero(curve: Curve) -> bool:
    """Whether a curve never leaves the axis: its line is hard to see there, and lies under or over another's."""
    rates = _known(curve, "rate")
    return bool(rates) and max(rates) == 0


def fast_p_figure(curves: Sequence[Curve], top: float = 1.0) -> Markup:
    """Share of problems with a correct kernel faster than p times PyTorch, for p from 0 to 4, each with its 95 % band.

    Args:
        curves: those without points, or with no problems, are left out.
        top: end of the vertical axis, from `curve_top`.
    """
    drawn = [curve for curve in curves if _known(curve, "rate")]
    last = max((curve.points["p"][-1] for curve in drawn if curve.points), default=4.0)

    def x(p: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * p / last

    def y(share: float) -> float:
        return TOP + PLOT * (1 - min(share, top) / top)

    parts = [_rule(LEFT, y(top * step / 4), WIDTH - RIGHT, y(top * step / 4), "grid") for step in range(5)]
    parts += [
        _text(LEFT - 8, y(top * step / 4) + 4, f"{percent(top * step / 4)} %", "end")
        for step in range(0, 5, 2 if top < 0.5 else 1)
    ]
    for p in range(ceil(last) + 1):
        parts.append(_rule(x(p), TOP, x(p), TOP + PLOT, "mark" if p in (1, 2) else "grid"))
        parts.append(_text(x(p), TOP + PLOT + 17, f"{p}", "middle"))
    parts.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP + PLOT + 38, "p, times the speed of PyTorch", "middle"))
    for curve in drawn:
        assert curve.points
        p, low, high = curve.points["p"], curve.points["low"], curve.points["high"]
        band = [(x(a), y(b)) for a, b in zip(p, high, strict=True)]
        band += [(x(a), y(b)) for a, b in zip(reversed(p), reversed(low), strict=True)]
        line = [(x(a), y(b)) for a, b in zip(p, curve.points["rate"], strict=True)]
        parts.append(Markup('<polygon class="band {}" points="{}"/>').format(curve.css, _points(band)))
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(curve.css, _points(line)))
    words = "; ".join(f"{curve.name}: {_at_marks(curve)}" for curve in drawn)
    return _svg(TOP + PLOT + BOTTOM, f"fast_p curves. {words}", parts)


def speed_reach(lanes: Sequence[Lane]) -> tuple[int, int]:
    """The powers of two between which all these speedups lie, 0.5x and 4x at least. Figures that are compared share
    them.
    """
    values = [speed for lane in lanes for _, speed in lane.kernels if speed > 0]
    return floor(log2(min([*values, 0.5]))), ceil(log2(max([*values, 4.0])))


def speedup_figure(lanes: Sequence[Lane], reach: tuple[int, int] | None = None) -> Markup:
    """Each verified and timed kernel as a dot on a logarithmic axis, a lane a model, with lines at 1x and 2x, and below
    the dots the geometric mean with its interval.

    Args:
        reach: ends of the axis, from `speed_reach`; default those of the lanes themselves.
    """
    low, high = reach or speed_reach(lanes)
    bottom = TOP + LANE * len(lanes)

    def x(speed: float) -> float:
        return LEFT + 8 + (WIDTH - LEFT - RIGHT - 16) * (log2(speed) - low) / (high - low)

    every = ceil((high - low + 1) / 9)
    parts = []
    for power in range(low, high + 1):
        place = x(2.0**power)
        parts.append(_rule(place, TOP, place, bottom, "mark" if power in (0, 1) else "grid"))
        if power % every == 0:
            parts.append(_text(place, bottom + 17, f"{2.0**power:g}x", "middle"))
    parts.append(_text(LEFT + (WIDTH - LEFT - RIGHT) / 2, bottom + 38, "speedup over PyTorch, log scale", "middle"))
    for number, lane in enumerate(lanes):
        parts += _lane(lane, TOP + LANE * number, x)
    words = "; ".join(f"{lane.name}: {len(lane.kernels)} kernels" for lane in lanes)
    return _svg(bottom + BOTTOM, f"Speedups of verified kernels. {words}", parts)


def _lane(lane: Lane, top: float, x: Any) -> list[Markup]:
    parts = [
        _rule(LEFT, top + LANE, WIDTH - RIGHT, top + LANE, "grid"),
        _lane_name(lane.name, top),
    ]
    if not lane.kernels:
        return [*parts, _text(LEFT + (WIDTH - LEFT - RIGHT) / 2, top + LANE / 2 + 4, "no verified kernel", "middle")]
    for (name, speed), (place, lift) in zip(lane.kernels, _swarm([x(s) for _, s in lane.kernels]), strict=True):
        dot = Markup('<circle class="dot-mark {}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}, {:.2f}x</title></circle>')
        parts.append(dot.format(lane.css, place, top + LANE * 0.43 + lift, DOT, name, speed))
    if lane.mean and lane.mean["geometric_mean"]:
        height = top + LANE - 12
        if ends := lane.mean["interval"]:
            parts.append(_rule(x(ends[0]), height, x(ends[1]), height, f"whisker {lane.css}"))
        mean = x(lane.mean["geometric_mean"])
        diamond = [(mean - 5, height), (mean, height - 5), (mean + 5, height), (mean, height + 5)]
        parts.append(Markup('<polygon class="mean {}" points="{}"/>').format(lane.css, _points(diamond)))
    return parts


def _lane_name(name: str, top: float) -> Markup:
    """Beside the lane where there is room, else at its upper edge: the first letters of two names may be the same."""
    if len(name) < 8:
        return _text(LEFT - 8, top + LANE / 2 + 4, name, "end")
    return _text(LEFT + 6, top + 14, name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…", "start")


def _swarm(places: Sequence[float]) -> list[tuple[float, float]]:
    """Where each dot lies, (x, offset from the middle of its lane): those that would hide one another are piled up and
    down by turns, closer together where a pile would leave its lane.
    """
    columns: dict[int, list[int]] = {}
    for index in sorted(range(len(places)), key=places.__getitem__):
        columns.setdefault(round(places[index] / (2 * DOT)), []).append(index)
    step = min(2 * DOT, (LANE * 0.72) / max(map(len, columns.values()), default=1))
    lifts = [0.0] * len(places)
    for column in columns.values():
        for rank, index in enumerate(column):
            lifts[index] = step * ((rank + 1) // 2) * (-1 if rank % 2 else 1)
    return list(zip(places, lifts, strict=True))


def difference_reach(differences: Sequence[Mapping[str, Any] | None]) -> float:
    """The end of an axis, to both sides of zero, that holds all these intervals: 0.25, 0.5 or 1."""
    ends = [abs(end) for d in differences if d and d["interval"] for end in d["interval"]]
    return next(reach for reach in (0.25, 0.5, 1.0) if max(ends, default=0.0) <= reach or reach == 1.0)


def difference_figure(difference: Mapping[str, Any] | None, reach: float = 1.0, css: str = "tuned") -> Markup:
    """A difference and its interval on an axis from -reach to +reach with zero in the middle."""
    if not difference or difference["difference"] is None:
        return Markup("")

    def x(value: float) -> float:
        return REACH + 2 + REACH * 0.96 * max(-1.0, min(1.0, value / reach))

    parts = [_rule(x(0), 0, x(0), 22, "mark"), _rule(x(-reach), 11, x(reach), 11, "grid")]
    if ends := difference["interval"]:
        parts.append(_rule(x(ends[0]), 11, x(ends[1]), 11, f"whisker {css}"))
    place = Markup('<circle class="mean {}" cx="{:.1f}" cy="11" r="4.5"/>')
    parts.append(place.format(css, x(difference["difference"])))
    label = difference_text(difference)
    return Markup('<svg class="forest" viewBox="0 0 {} 22" role="img" aria-label="{}">{}</svg>').format(
        f"{2 * REACH + 4:.0f}", label, Markup("").join(parts)
    )


def reach_text(reach: float) -> str:
    """What an axis of differences spans: `−50 to +50 points`."""
    return f"{points(-reach)} to {points(reach)} points"


def _known(curve: Curve, name: str) -> list[float]:
    return [value for value in (curve.points or {}).get(name, []) if value is not None]


def _at_marks(curve: Curve) -> str:
    points_of = curve.points or {}
    found = {round(p, 3): rate for p, rate in zip(points_of["p"], points_of["rate"], strict=True)}
    return ", ".join(f"{percent(found[p])} % above {p:g}x" for p in (0.0, 1.0, 2.0) if p in found)


def _svg(height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="figure-svg" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, label, Markup("").join(parts)
    )


def _rule(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(css, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
