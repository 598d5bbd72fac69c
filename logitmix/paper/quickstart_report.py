"""The results of the quickstart: two tables in the terminal, two figures, and every number as JSON lines."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from logitmix.evaluation.metrics import Rates
from logitmix.evaluation.report.figures import plot_curves, plot_sweep
from logitmix.evaluation.report.tables import print_rates, print_sweep
from logitmix.paper.quickstart_config import QuickstartConfig
from logitmix.paper.recipes import TITLES
from logitmix.runs.files import EVALUATIONS_FILE, read_jsonl


def write_report(config: QuickstartConfig, sweep: Sequence[dict[str, Any]], trained: dict[str, Rates]) -> None:
    """Print the tables and write `sweep.png`, `curves.png` and `results.jsonl`.

    `sweep` has a row for each scheme and alpha of the untrained pair, `trained` the final rates by name.
    """
    folder = Path(config.output_dir)
    names = tuple(Rates.__dataclass_fields__)
    untrained = {
        row["alpha"]: Rates(**{name: row[name] for name in names}) for row in sweep if row["scheme"] == "logit"
    }
    best = max(untrained, key=lambda alpha: untrained[alpha].answer)
    rates = {
        "base": untrained[0.0],
        "SFT (anchor)": untrained[1.0],
        f"untrained, best alpha {best:.1f}": untrained[best],
    }
    rates |= trained

    print_sweep(f"Mixing the untrained pair, {config.eval_limit} test problems", sweep)
    rollouts = config.rl_steps * config.questions * config.num_generations
    title = f"Before and after {config.rl_steps} steps, {rollouts} rollouts an arm, {config.eval_limit} test problems"
    print_rates(title, rates)
    plot_sweep(sweep, "Mixing the untrained base with its SFT model", folder / "sweep.png")
    plot_curves(
        accuracy_curves(config, rates["SFT (anchor)"].answer),
        "Training from the same pair, with as many rollouts",
        folder / "curves.png",
    )
    with (folder / "results.jsonl").open("w") as file:
        for row in sweep:
            file.write(json.dumps({"what": "sweep", "seed": config.seed} | row) + "\n")
        for label, r in rates.items():
            file.write(json.dumps({"what": "final", "seed": config.seed, "name": label} | asdict(r)) + "\n")


def accuracy_curves(config: QuickstartConfig, sft: float) -> dict[str, list[tuple[int, float]]]:
    """Points (step, answer rate) of each arm's mixture, or model without an anchor, and of the SFT model."""
    labels = {
        "fixed_mixing": f"fixed mixing, alpha {config.alpha:g}: mixture",
        "grpo_kl": "GRPO+KL, beta 0.01",
    }
    curves: dict[str, list[tuple[int, float]]] = {}
    for arm in config.arm_names:
        points: dict[str, list[tuple[int, float]]] = {}
        for row in read_jsonl(Path(config.output_dir) / arm / EVALUATIONS_FILE):
            points.setdefault(row["name"], []).append((row["step"], row["answer"]))
        curves[labels.get(arm, TITLES[arm])] = points["mixture" if "mixture" in points else "model"]
        if arm == "fixed_mixing":
            curves["fixed mixing: policy alone"] = points["policy"]
    steps = [step for step, _ in next(iter(curves.values()))]
    return curves | {"SFT (the anchor)": [(step, sft) for step in steps]}
