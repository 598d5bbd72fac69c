"""Figures, from the numbers that evaluation wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which people of any colour vision can tell apart; markers differ as well
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "x")


def plot_curves(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, path: Path) -> None:
    """Held-out answer rate, in per cent, against the training step: one line a run."""
    figure, (axes,) = _figure(title, "training step", ["answer-correct on test problems, greedy (%)"])
    for i, (name, points) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps, [100 * v for v in values], label=name, color=COLORS[i % 6], marker=MARKERS[i % 6], markersize=4
        )
    _save(figure, axes, path)


def plot_sweep(sweep: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Format rate and answer rate, in per cent, against alpha, side by side: one line a scheme."""
    panels = {"format": "format-correct (%)", "answer": "answer-correct (%)"}
    figure, axes = _figure(title, "alpha (0: base alone, 1: SFT alone)", list(panels.values()))
    for i, scheme in enumerate(dict.fromkeys(row["scheme"] for row in sweep)):
        rows = [row for row in sweep if row["scheme"] == scheme]
        for panel, key in zip(axes, panels, strict=True):
            panel.plot(
                [row["alpha"] for row in rows],
                [100 * row[key] for row in rows],
                color=COLORS[i],
                # where two schemes coincide, the first shows around the second
                linewidth=3 - 1.8 * i,
                marker=MARKERS[i],
                markersize=7 - 3 * i,
                label=f"scheme {scheme}",
            )
    _save(figure, axes[0], path)


def _figure(title: str, x: str, ys: Sequence[str]) -> tuple[Any, Any]:
    """A figure with a panel for each y."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (panels,) = pyplot.subplots(
        1, len(ys), figsize=(7 if len(ys) == 1 else 9, 5), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=11)
    for axes, y in zip(panels, ys, strict=True):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(-2, 102)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _save(figure: Any, axes: Any, path: Path) -> None:
    from matplotlib import pyplot

    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
