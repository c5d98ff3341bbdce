"""What every plot on a page is made of: a matplotlib figure that remembers its points, drawn as SVG in the page's own colours.

The SVG stands by itself, so that a page can be printed and a plot copied. The points go with it as JSON; `chart.js` shows their
values under the pointer or the keys, and zooms.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "CYCLE",
    "DASHES",
    "GREEN",
    "GREY",
    "NAMES",
    "ORANGE",
    "PURPLE",
    "RED",
    "Chart",
    "Plot",
    "drawn",
    "fix",
    "track",
]

# Placeholders for matplotlib, which `_svg` replaces by the page's variables.
STAND_INS = [f"#0102{i:02x}" for i in range(3, 11)]
INK, GRID, BLUE, ORANGE, GREEN, RED, PURPLE, GREY = STAND_INS
NAMES = dict(zip(STAND_INS, ("ink", "grid", "blue", "orange", "green", "red", "purple", "grey"), strict=True))
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
DASHES = ("-", "--", "-.", ":")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vpd-mlx",
    "text.parse_math": False,  # a `$` in a label is a dollar
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.borderaxespad": 0.1,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}
DIGITS = 5  # significant ones of a value under the pointer


@dataclass(frozen=True)
class Plot:
    """A plot as SVG, and its points as `chart.js` reads them."""

    svg: Markup
    data: dict[str, Any]


class Chart(Figure):
    """A figure that knows the points of its curves, by axes."""

    def __init__(self) -> None:
        super().__init__(figsize=(4.4, 2.5), layout="constrained")
        self.tracks: dict[Axes, list[dict[str, Any]]] = {}
        self.fixed: set[Axes] = set()
        """Axes whose range of values stays when a page is zoomed: shares of a whole."""

    def data(self) -> dict[str, Any]:
        """The axes with curves: where they stand in the SVG, in its units, and their points. Call it after drawing."""
        width, height = 72 * self.get_figwidth(), 72 * self.get_figheight()
        axes = []
        for axis, tracks in self.tracks.items():
            box = axis.get_position()
            edges = (box.x0 * width, (1 - box.y1) * height, box.x1 * width, (1 - box.y0) * height)
            axes.append(
                {
                    "box": [round(v, 2) for v in edges],
                    "x": list(axis.get_xlim()),
                    "y": list(axis.get_ylim()),
                    "name": axis.get_ylabel(),
                    "log": axis.get_yscale() == "log",
                    "fixed": axis in self.fixed,
                    "tracks": tracks,
                }
            )
        return {"axes": axes}


def track(
    axis: Axes,
    label: str,
    color: str,
    x: Sequence[float],
    y: Sequence[float],
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
) -> None:
    """Remember a curve's points, and its interval at each of them."""
    chart = axis.get_figure()
    if not isinstance(chart, Chart):
        raise TypeError(f"a {type(chart).__name__} remembers no points; draw on a Chart")
    found: dict[str, Any] = {"name": label, "color": NAMES[color], "x": _rounded(x), "y": _rounded(y)}
    if bounds is not None:
        found |= {"low": _rounded(bounds[0]), "high": _rounded(bounds[1])}
    chart.tracks.setdefault(axis, []).append(found)


def fix(axis: Axes) -> None:
    """Keep the range of values when a reader zooms: shares add up to a whole."""
    chart = axis.get_figure()
    if isinstance(chart, Chart):
        chart.fixed.add(axis)


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{v:.{DIGITS}g}") for v in values]


def drawn(plots: Mapping[str, Callable[[Chart], bool]]) -> dict[str, Plot]:
    """The plots by name; those whose function finds nothing to draw are left out."""
    out = {}
    for name, draw in plots.items():
        with mpl.rc_context(STYLE):
            chart = Chart()
            if draw(chart):
                svg = Markup(_svg(chart, name))
                out[name] = Plot(svg, chart.data())
    return out


def _svg(figure: Chart, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head = rf'<svg viewBox="\1" role="img" aria-labelledby="title-{name}">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', head, text, count=1)
    # Several plots share one page: each needs ids of its own.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for stand_in, variable in NAMES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    return text
