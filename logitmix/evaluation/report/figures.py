"""Figures of evaluations and training runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from logitmix.evaluation.report.curves import Line, Panel

# Okabe and Ito's colours, which are distinct in any colour vision; markers differ as well
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "x")
LINES = ("-", "--", ":")
# Inches, small enough for text to be readable on a phone; the legend adds to the height
HEIGHT, LEGEND_ROW = 3.7, 0.19
WIDEST_OF_TWO = 30  # characters of a label in a legend of two columns


def plot_curves(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, path: Path) -> None:
    """Plot the held-out answer rate in per cent against the training step, with one line per run."""
    figure, (axes,) = _figure(title, "training step", ["answer-correct on test problems, greedy (%)"])
    for i, (name, points) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True)
        style = {"color": COLORS[i % 6], "marker": MARKERS[i % 6], "linestyle": "-" if i < 6 else "--"}
        axes.plot(steps, [100 * v for v in values], label=name, markersize=4, **style)
    _save(figure, axes, path)


def plot_panel(panel: Panel, lines: Sequence[Line], *paths: Path) -> None:
    """Plot a quantity against the outer step: for each arm the mean over seeds, and a band from lowest to highest."""
    figure, (axes,) = _figure(panel.title, "outer step (one sampling of rollouts)", [panel.axis], panel.limits)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for line in lines:
        curve, color = line.curve, COLORS[line.arm % len(COLORS)]
        every = max(1, len(curve.steps) // 7)
        axes.plot(
            curve.steps,
            curve.mean,
            label=_escape_label(line.label),
            color=color,
            linestyle=LINES[(line.variant + line.arm // len(COLORS)) % len(LINES)],
            marker=MARKERS[line.arm % len(MARKERS)],
            # where lines coincide, an earlier one is wider than a later one, and their markers alternate
            linewidth=max(1.0, 2.4 - 0.28 * line.arm),
            markersize=4.5,
            markevery=(line.arm % every, every),
        )
        if curve.seeds > 1:
            axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    _save(figure, axes, *paths)


def plot_sweep(
    sweep: Sequence[Mapping[str, Any]], title: str, *paths: Path, members: tuple[str, str] = ("base", "SFT")
) -> None:
    """Plot format rate and answer rate in per cent against alpha, side by side, with one line per scheme.

    Intervals are drawn as bands if the rows have them (`format_low`, `format_high`, …).
    """
    panels = {"format": "format-correct (%)", "answer": "answer-correct (%)"}
    figure, axes = _figure(title, f"alpha (0: {members[0]} alone, 1: {members[1]} alone)", list(panels.values()))
    for i, scheme in enumerate(dict.fromkeys(row["scheme"] for row in sweep)):
        rows = [row for row in sweep if row["scheme"] == scheme]
        alphas = [row["alpha"] for row in rows]
        for panel, key in zip(axes, panels, strict=True):
            panel.plot(
                alphas,
                [100 * row[key] for row in rows],
                color=COLORS[i],
                # where two schemes coincide, the first is wider than the second
                linewidth=3 if i == 0 else 1.2,
                linestyle="--" if i == 2 else "-",
                marker=MARKERS[i],
                markersize=7 if i == 0 else 4,
                label=f"scheme {scheme}" if scheme != "merge" else "weights merged",
            )
            if f"{key}_low" in rows[0]:
                low, high = ([100 * row[f"{key}_{end}"] for row in rows] for end in ("low", "high"))
                panel.fill_between(alphas, low, high, color=COLORS[i], alpha=0.12, linewidth=0)
    _save(figure, axes[0], *paths)


def _figure(title: str, x: str, ys: Sequence[str], limits: tuple[float, float] | None = (-2, 102)) -> tuple[Any, Any]:
    """A figure with one panel per y axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (panels,) = pyplot.subplots(
        1, len(ys), figsize=(5.6 if len(ys) == 1 else 8, HEIGHT), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=11)
    for axes, y in zip(panels, ys, strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if limits is not None:
            axes.set_ylim(*limits)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _escape_label(label: str) -> str:
    """A label shown literally: matplotlib renders `$` as mathematics, and hides labels that begin with `_`."""
    return label.replace("$", r"\$") if not label.startswith("_") else f" {label}".replace("$", r"\$")


def _save(figure: Any, axes: Any, *paths: Path) -> None:
    """Save the figure with its legend below, as PNG or SVG by the suffix of each path."""
    from matplotlib import pyplot

    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= WIDEST_OF_TWO else 1
    figure.set_figheight(HEIGHT + LEGEND_ROW * math.ceil(len(labels) / columns))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=3
    )
    with pyplot.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "logitmix"}
    ):  # keep text as text, and the file reproducible
        for path in paths:
            figure.savefig(path, dpi=180, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
