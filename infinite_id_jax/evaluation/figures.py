"""The report's diagrams as SVG: the same bytes for the same figures, their letters drawn as outlines."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from infinite_id_jax.errors import MissingExtraError
from infinite_id_jax.evaluation.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, told apart by colour-blind readers, less the yellow that white swallows. Markers differ too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#e69f00")
_MARKERS = "osD^vPX*hp<>"
_INK, _FAINT = "#222222", "#dddddd"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "infinite_id_jax",  # else the names inside an SVG are random
    "svg.fonttype": "path",
    "text.hinting": "none",  # so that a label is as wide as measured
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_PIXELS_PER_INCH = 72  # of SVG: a pixel is a point


def check() -> None:
    """Raises MissingExtraError without the extra `evaluate`, before hours are spent on what a report will show."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("A diagram", "evaluate")


def scatter(
    points: Mapping[str, tuple[Estimate, Estimate]],
    *,
    x_label: str = "semantic consistency",
    y_label: str = "identity fidelity",
) -> bytes:
    """Methods as named points with their intervals across and upwards (Infinite-ID Fig. 9), as SVG.

    Raises MissingExtraError without the extra `evaluate`.
    """
    with _figure(7.0, 5.0) as (figure, axes):
        for number, (x, y) in enumerate(points.values()):
            _error_bars(axes, [x.value], [y], number, across=x)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(0.12)
        figure.draw_without_rendering()  # which settles where points lie
        figure.set_layout_engine("none")
        named = {name: pair for name, pair in points.items() if not np.isnan([pair[0].value, pair[1].value]).any()}
        _label_points(axes, named)
        return _svg(figure)


def curve(
    x: Sequence[str],
    lines: Mapping[str, Sequence[Estimate]],
    *,
    x_label: str,
    y_label: str,
    baselines: Mapping[str, float] | None = None,
) -> bytes:
    """Lines of figures with their intervals over named steps (Infinite-ID Fig. 11), as SVG.

    `baselines` are levels to compare with, drawn across. Raises MissingExtraError without the extra `evaluate`.
    """
    with _figure(7.0, 4.0) as (figure, axes):
        for number, (name, estimates) in enumerate(lines.items()):
            aside = 0.06 * (number - (len(lines) - 1) / 2)  # else the intervals of one step hide each other
            at = [step + aside for step in range(len(estimates))]
            axes.plot(at, [e.value for e in estimates], color=_colour(number), linewidth=1.5)
            _error_bars(axes, at, estimates, number, label=name)
        for name, level in (baselines or {}).items():
            axes.axhline(level, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
            # Beside the axes, where no line passes.
            axes.annotate(
                name, (1, level), (4, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                fontsize=8.5, verticalalignment="center", annotation_clip=False,
            )  # fmt: skip
        axes.set_xticks(range(len(x)), x)
        axes.set_xlim(-0.4, len(x) - 0.6)
        axes.set(xlabel=x_label, ylabel=y_label)
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure)


@contextmanager
def _figure(width: float, height: float) -> "Iterator[tuple[Figure, Axes]]":
    """A figure of its own, without pyplot and the list it keeps of all figures."""
    check()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure((width, height), dpi=_PIXELS_PER_INCH, layout="constrained")
        yield figure, figure.subplots()


def _svg(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _error_bars(
    axes: "Axes",
    x: Sequence[float],
    y: Sequence[Estimate],
    number: int,
    *,
    across: Estimate | None = None,
    label: str | None = None,
) -> None:
    def reach(estimates: Sequence[Estimate]) -> np.ndarray:
        return np.maximum([[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]], 0)

    axes.errorbar(
        x, [e.value for e in y], reach(y), None if across is None else reach([across]),
        fmt=_MARKERS[number % len(_MARKERS)], color=_colour(number), markersize=7, elinewidth=1, capsize=0, label=label,
    )  # fmt: skip


def _label_points(axes: "Axes", points: Mapping[str, tuple[Estimate, Estimate]]) -> None:
    """A name beside each point, with a line to it where it had to move away."""
    if not points:
        return
    ends = [[(a.low, b.value), (a.high, b.value), (a.value, b.low), (a.value, b.high)] for a, b in points.values()]
    centres = axes.transData.transform([(a.value, b.value) for a, b in points.values()])
    reach = np.nan_to_num(axes.transData.transform(np.reshape(ends, (-1, 2))).reshape(-1, 2, 2, 2), nan=np.inf)
    thin = [[-1.5, -1.5], [1.5, 1.5]]
    bars = [pair + thin for bars in reach for pair in bars if np.isfinite(pair).all()]
    obstacles = np.array([*(centre + np.array([[-5, -5], [5, 5]]) for centre in centres), *bars])
    texts = [axes.annotate(name, centre, xycoords="figure pixels", fontsize=9) for name, centre in
             zip(points, centres, strict=True)]  # fmt: skip
    sizes = np.array([text.get_window_extent().size for text in texts])
    corners = place_labels(centres, sizes, obstacles, axes.get_window_extent().get_points())
    for text, corner, centre, size in zip(texts, corners, centres, sizes, strict=True):
        text.set_position(corner)
        nearest = np.clip(centre, corner, corner + size)
        if np.linalg.norm(nearest - centre) > 14:
            axes.annotate(
                "", nearest, centre, xycoords="figure pixels", textcoords="figure pixels",
                arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip


def place_labels(
    points: Float[np.ndarray, "n 2"],
    sizes: Float[np.ndarray, "n 2"],
    obstacles: Float[np.ndarray, "m 2 2"],
    bounds: Float[np.ndarray, "2 2"],
) -> Float[np.ndarray, "n 2"]:
    """Lower left corners for labels near their points, off each other and the obstacles where there is room.

    Boxes are (lower left, upper right) in pixels. One label after another takes the cheapest of the places around
    its point: an overlap costs its area, leaving `bounds` the area outside and more, distance a little.
    """
    angles = np.arange(16) * np.pi / 8
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    boxes = list(obstacles)
    corners = np.zeros_like(points)
    for number, (point, size) in enumerate(zip(points, sizes, strict=True)):
        options = [
            (point + distance * ray + (np.sign(np.round(ray, 6)) - 1) / 2 * size, distance)
            for distance in (8, 14, 22, 34, 48, 64)
            for ray in rays
        ]
        costs = [
            sum(_overlap(np.stack([corner, corner + size]), box) for box in boxes)
            + 4 * (size.prod() - _overlap(np.stack([corner, corner + size]), bounds))
            + distance
            for corner, distance in options
        ]
        corners[number] = options[int(np.argmin(costs))][0]
        boxes.append(np.stack([corners[number], corners[number] + size]))
    return corners


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Area that two boxes share."""
    sides = np.minimum(one[1], other[1]) - np.maximum(one[0], other[0])
    return float(np.maximum(sides, 0).prod())
