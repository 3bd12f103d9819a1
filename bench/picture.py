"""Pictures as SVG, written by hand: readable on a light and on a dark page, no library needed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from bench.report import OURS, ROWS, Medians, Row, show

_STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #555 }
.title { font-size: 16px; font-weight: 600 } .small { font-size: 11px } .right { text-anchor: end }
.middle { text-anchor: middle }
.grid { stroke: #888; stroke-opacity: .3 } .one { stroke: #888; stroke-width: 1.5 }
.curve { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #bbb } }
</style>"""
_COLOURS = {
    "raw": "#888888",
    "bindfs": "#b58900",
    "bare": "#2e9e6b",
    "rclone": "#3b82d6",
    "s3ql": "#9b59d0",
    OURS: "#e4572e",
}
_PALETTE = ("#e4572e", "#3b82d6", "#2e9e6b", "#b58900", "#9b59d0", "#888888")


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', _STYLE, *parts, "</svg>\n"])


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


# -- the comparison -------------------------------------------------------------------------------------------------

_LEFT, _SPAN, _LINE, _TOP, _VALUES = 270, 520, 26, 84, 130
_LOW, _HIGH = 1 / 32, 32


def _x(ratio: float) -> float:
    inside = min(_HIGH, max(_LOW, ratio))
    return _LEFT + _SPAN * math.log(inside / _LOW) / math.log(_HIGH / _LOW)


def comparison(medians: Medians, targets: Sequence[str], note: str) -> str:
    """A line a figure, a dot a target: how many times as fast as the best peer (as bare where there is none)."""
    names = [name for name in targets if name in _COLOURS]
    rows = [row for row in ROWS if row.figure != "new_bytes" and _base(medians, row)]
    height = _TOP + _LINE * len(rows) + 40
    parts = [_text(16, 24, "metadiskfs beside its peers", "title"), _text(16, 44, note, "small")]
    parts += _legend(names)
    bottom = _TOP + _LINE * len(rows) - 8
    for power in range(-5, 6):
        x = _x(2.0**power)
        parts.append(
            f'<line x1="{x:.1f}" y1="{_TOP - 14}" x2="{x:.1f}" y2="{bottom}" class="{"grid" if power else "one"}"/>'
        )
        label = f"{2**power}×" if power >= 0 else f"1/{2**-power}"
        parts.append(_text(x, bottom + 16, label, "small middle"))
    parts.append(_text(_x(1), bottom + 31, "the best peer = 1; to the right is better", "small middle"))
    for number, row in enumerate(rows):
        parts += _row(medians, row, names, _TOP + _LINE * number)
    return _svg(_LEFT + _SPAN + _VALUES, height, parts)


def _base(medians: Medians, row: Row) -> float | None:
    peer = medians.best_peer(row)
    return peer if peer is not None else medians.figure("bare", row)


def _legend(names: Sequence[str]) -> list[str]:
    parts, x = [], float(_LEFT)
    for name in names:
        parts.append(f'<circle cx="{x:.1f}" cy="58" r="5" fill="{_COLOURS[name]}"/>')
        parts.append(_text(x + 10, 62, name))
        x += 34 + 8 * len(name)
    return parts


def _row(medians: Medians, row: Row, names: Sequence[str], y: float) -> list[str]:
    base = _base(medians, row)
    assert base is not None
    parts = [_text(_LEFT - 12, y + 4, row.title, "right")]
    parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_LEFT + _SPAN}" y2="{y}" class="grid"/>')
    ours = medians.figure(row.of, row)
    for name in names:
        value = ours if name == OURS else medians.figure(name, row)
        if value:
            size = 6.5 if name == OURS else 4.5
            x = _x(row.ratio(value, base))
            tip = f"<title>{escape(name)}: {show(value)} {row.unit}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="{size}" fill="{_COLOURS[name]}">{tip}</circle>')
    if ours is not None:
        parts.append(_text(_LEFT + _SPAN + 14, y + 4, f"{show(ours)} {row.unit}"))
    return parts


# -- curves ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over one axis. ``log_x``: each step to the right is a multiple."""

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    limit: float | None = None
    notes: Sequence[str] = field(default_factory=tuple)


_WIDE, _HIGHT, _COLUMNS = 420, 250, 2


def charts(title: str, shown: Sequence[Chart]) -> str:
    """Several charts side by side in one picture."""
    drawn = [chart for chart in shown if any(chart.curves.values())]
    parts = [_text(16, 24, title, "title")]
    for number, chart in enumerate(drawn):
        parts += _chart(chart, 16 + number % _COLUMNS * _WIDE, 40 + number // _COLUMNS * _HIGHT)
    return _svg(16 + _WIDE * _COLUMNS, 50 + _HIGHT * -(-len(drawn) // _COLUMNS), parts)


def _chart(chart: Chart, left: float, top: float) -> list[str]:
    points = [point for curve in chart.curves.values() for point in curve]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_high = max([y for _, y in points] + ([chart.limit] if chart.limit else [])) * 1.1 or 1
    width, height, x0, y0 = _WIDE - 90, _HIGHT - 96, left + 50, top + 30

    def at_x(x: float) -> float:
        if x_high == x_low:
            return x0
        if chart.log_x:
            return x0 + width * math.log(x / x_low) / math.log(x_high / x_low)
        return x0 + width * (x - x_low) / (x_high - x_low)

    def at_y(y: float) -> float:
        return y0 + height * (1 - y / y_high)

    parts = [
        _text(left, top + 12, chart.title),
        _text(x0 + width / 2, y0 + height + 32, chart.x_label, "small middle"),
    ]
    parts.append(_text(left + 4, y0 - 6, chart.y_label, "small"))
    for part in range(5):
        value = y_high * part / 4
        y = at_y(value)
        parts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + width}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(x0 - 6, y + 4, show(value) if value else "0", "small right"))
    marked = sorted({x for x, _ in points})
    if len(marked) > 6:
        marked = [x_low, x_high]
    parts += [_text(at_x(x), y0 + height + 16, _short(x), "small middle") for x in marked]
    if chart.limit:
        y = at_y(chart.limit)
        parts.append(
            f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + width}" y2="{y:.1f}" class="one" stroke-dasharray="5 4"/>'
        )
    for curve, colour in zip(chart.curves.values(), _PALETTE * 3, strict=False):
        if not curve:
            continue
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in curve)
        parts.append(f'<polyline points="{path}" class="curve" stroke="{colour}"/>')
        parts += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.5" fill="{colour}"/>' for x, y in curve[:40]]
    parts += _names(chart, x0, y0 + height + 46)
    return parts


def _names(chart: Chart, x: float, y: float) -> list[str]:
    parts = []
    for name, colour in zip(chart.curves, _PALETTE * 3, strict=False):
        parts.append(f'<circle cx="{x:.1f}" cy="{y - 4:.1f}" r="4" fill="{colour}"/>')
        parts.append(_text(x + 8, y, name, "small"))
        x += 26 + 6.2 * len(name)
    return parts


def _short(value: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"
