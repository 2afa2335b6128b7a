"""A small plotting kit that writes inline SVG: axes, lines, dots, text. Colours come from the page's style sheet.

Every mark has a class, never a colour of its own, so that one page is right in light and in dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, int(math.floor(high / step + 1e-9)) + 1)]


def number(value: float) -> str:
    """A tick's label: 1200 -> 1.2k, 0.10 -> 0.1."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}"


@dataclass
class Plot:
    """One panel. Data coordinates go in, an ``<svg>`` comes out."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str = ""
    y_label: str = ""
    width: int = 640
    height: int = 400
    left: int = 66
    right: int = 16
    top: int = 14
    bottom: int = 46
    title: str = ""
    x_ticks: Sequence[float] | None = None
    y_ticks: Sequence[float] | None = None
    marks: list[str] = field(default_factory=list)

    def px(self, x: float) -> float:
        low, high = self.x
        return self.left + (x - low) / ((high - low) or 1) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (y - low) / ((high - low) or 1) * (self.height - self.top - self.bottom)

    def line(self, points: Sequence[tuple[float, float]], css: str, tip: str = "") -> None:
        if len(points) > 1:
            path = "M" + "L".join(f"{self.px(x):.1f} {self.py(y):.1f}" for x, y in points)
            self.marks.append(f'<path class="line {css}" d="{path}">{_tip(tip)}</path>')

    def dot(self, x: float, y: float, radius: float, css: str, tip: str = "") -> None:
        at = f'cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="{radius:.1f}"'
        self.marks.append(f'<circle class="dot {css}" {at}>{_tip(tip)}</circle>')

    def segment(self, a: tuple[float, float], b: tuple[float, float], css: str) -> None:
        x1, y1, x2, y2 = self.px(a[0]), self.py(a[1]), self.px(b[0]), self.py(b[1])
        self.marks.append(f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def text(
        self, x: float, y: float, text: str, css: str = "", anchor: str = "start", dx: float = 0, dy: float = 0
    ) -> None:
        at = f'x="{self.px(x) + dx:.1f}" y="{self.py(y) + dy:.1f}"'
        self.marks.append(f'<text class="{css}" {at} text-anchor="{anchor}">{html.escape(text)}</text>')

    def axes(self) -> str:
        """Hairline grid, tick labels, titles of the axes."""
        out = []
        bottom, right = self.height - self.bottom, self.width - self.right
        for value in ticks(*self.y) if self.y_ticks is None else self.y_ticks:
            y = self.py(value)
            out.append(f'<line class="grid" x1="{self.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            out.append(
                f'<text class="tick" x="{self.left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
            )
        for value in ticks(*self.x, count=6) if self.x_ticks is None else self.x_ticks:
            x = self.px(value)
            out.append(f'<line class="grid" x1="{x:.1f}" y1="{self.top}" x2="{x:.1f}" y2="{bottom}"/>')
            out.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{number(value)}</text>')
        out.append(f'<line class="axis" x1="{self.left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
        middle_x, middle_y = (self.left + right) / 2, (self.top + bottom) / 2
        if self.x_label:
            label = html.escape(self.x_label)
            out.append(
                f'<text class="label" x="{middle_x:.0f}" y="{self.height - 8}" text-anchor="middle">{label}</text>'
            )
        if self.y_label:
            label = html.escape(self.y_label)
            turn = f'transform="translate(14 {middle_y:.0f}) rotate(-90)"'
            out.append(f'<text class="label" {turn} text-anchor="middle">{label}</text>')
        return "".join(out)

    def render(self) -> str:
        label = html.escape(self.title or self.y_label, quote=True)
        box = f'viewBox="0 0 {self.width} {self.height}"'
        return f'<svg class="plot" {box} role="img" aria-label="{label}">{self.axes()}{"".join(self.marks)}</svg>'


def _tip(text: str) -> str:
    return f"<title>{html.escape(text)}</title>" if text else ""
