"""The loss curves of several runs in one picture, an SVG that takes the colours of the page it stands in."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qwen_image.comparison.runs import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIGHT = ("#1a1a1a", "#1400ff", "#ea7022", "#247264", "#2d9ac7", "#893300", "#44005f")
DARK = ("#f2f2f2", "#66ae88", "#c63310", "#00736c", "#e1a5ff", "#b3fd15", "#b300f5")
"""Colours of lines on a light and on a dark page. They were searched for: also colour-blind readers of each kind see a
clear difference between any two (CIEDE2000 of 18 and more), and each stands out from its page (contrast of 3)."""
DASHES = ("none", "6 2", "2 2", "8 2 2 2")
"""Each line has another dash than its neighbours as well; with seven colours 28 lines differ."""
TEXT = "#010203"
"""Stands for the page's text colour until the picture is written."""
POINTS = 600
"""Of a curve, at most: a picture has no more columns to show."""


def line_style(index: int) -> tuple[str, str]:
    """Return the colour, a CSS value, and the dash, an SVG value, of the line with this number."""
    return f"var(--line-{index % len(LIGHT)})", DASHES[index % len(DASHES)]


def has_curves(runs: Sequence[Run]) -> bool:
    """Whether there is anything to draw."""
    return any(run.training_losses or run.validation_losses for run in runs)


def curves_svg(runs: Sequence[Run]) -> str:
    """Return the picture as an ``<svg>`` element, the same for the same losses. No text in it is the user's.

    The page must define the colours that `line_style` names.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    validated = any(run.validation_losses for run in runs)
    settings = {"svg.hashsalt": "loss curves", "svg.fonttype": "none"}
    with matplotlib.rc_context({**settings, **dict.fromkeys(("text.color", "axes.labelcolor"), TEXT)}):
        figure = Figure(figsize=(10, 7 if validated else 4), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(2 if validated else 1, 1, sharex=True, squeeze=False)[:, 0]
        if validated:
            _plot(panels[0], runs, lambda run: run.validation_losses, "validation loss", marker="o")
        _plot(panels[-1], runs, lambda run: run.training_losses, "training loss, average of an epoch")
        panels[-1].set_xlabel("step")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _inline(stream.getvalue())


def _plot(axes: Axes, runs: Sequence[Run], curve: Callable[[Run], Curve], label: str, marker: str = "") -> None:
    values = []
    for index, run in enumerate(runs):
        points = [(step, loss if math.isfinite(loss) else math.nan) for step, loss in _thinned(curve(run))]
        values += [loss for _, loss in points if not math.isnan(loss)]
        dash = DASHES[index % len(DASHES)]
        axes.plot(
            [step for step, _ in points], [loss for _, loss in points], color=LIGHT[index % len(LIGHT)],
            linestyle="solid" if dash == "none" else (0, tuple(map(int, dash.split()))), linewidth=1.5,
            # a single point has no line
            marker=marker or ("." if len(points) == 1 else ""), markersize=4,
        )  # fmt: skip
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25, color=TEXT)
    axes.tick_params(which="both", color=TEXT, labelcolor=TEXT)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for spine in axes.spines.values():
        spine.set_edgecolor(TEXT)


def _thinned(curve: Curve) -> Curve:
    """Return every so many-th point, and the last one."""
    every = -(-len(curve) // POINTS) or 1
    return curve[:-1][::every] + curve[-1:]


def _inline(svg: str) -> str:
    """Turn a file into an element: without its prolog, and with colours that the page decides on."""
    element = svg[svg.index("<svg") :].rstrip()
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    element = element.replace(TEXT, "currentColor")
    for index, colour in enumerate(LIGHT):
        element = element.replace(colour, f"var(--line-{index})")
    return element
