"""Drawing: what all figures share: their style, their size, and SVG in the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

Tree = Mapping[str, Any]

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""

GRID = "#8a93a3"

WIDTH = 10.0
"""Inches: all figures are as wide as the page, so that their texts are as large."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "figure.facecolor": "none",
}


def svgs(makers: Mapping[str, Callable[[Tree], Figure | None]], tree: Tree) -> dict[str, str]:
    """Every figure that the tree has data for: name -> inline SVG."""
    out = {}
    for name, make in makers.items():
        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
            figure = make(tree)
            if figure is not None:
                out[name] = _svg(figure)
    return out


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # The page gives the width; namespaces are not needed inside HTML.
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    return f'<svg {box.group() if box else ""} role="img">{body}'


def panels(count: int, width: float, height: float, rows: int = 1) -> tuple[Figure, list[Any]]:
    """A figure of so many panels side by side in each row; width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, count, squeeze=False).ravel()
    for axis in axes:
        axis.grid(axis="y")
        axis.set_axisbelow(True)
    return figure, list(axes)
