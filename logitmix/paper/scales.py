"""The scales of `logitmix reproduce`: a cell of the recipes and what to change in it."""

from dataclasses import dataclass, field
from typing import Any

from logitmix.paper.recipes import EXTRA_TITLES, PAPER_CELLS, SMOLLM2_CELL, TINY_CELL
from logitmix.tasks.names import unknown_name


@dataclass(frozen=True)
class Scale:
    """A cell of the recipes and changes to its settings, by flag.

    cell:       whose recipes are run
    about:      one line for the report
    base_steps: updates that train the quickstart's base model; None uses the base model of the recipe
    sft, train: changes to the settings of the SFT stage and of every arm
    adaptive:   changes to those of the arm with an adaptive weight
    extra_arms: run beside the paper's six: of `EXTRA_TITLES`
    distill:    changes to the settings of the arm `distilled`
    minutes:    of a seed, as measured on two cores of AMD EPYC; None if it has not been
    """

    cell: str
    about: str
    base_steps: int | None = None
    sft: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    adaptive: dict[str, Any] = field(default_factory=dict)
    extra_arms: tuple[str, ...] = ()
    distill: dict[str, Any] = field(default_factory=dict)
    minutes: float | None = None


_SMOKE = {"max_steps": 2, "per_device_train_batch_size": 16, "num_generations": 4, "eval_every": 1}
_SMOKE |= {"eval_limit": 8}
_ALL = tuple(EXTRA_TITLES)
# As in docs/distill.md, where they are measured
_DISTILL = {"per_device_train_batch_size": 64, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
_DISTILL |= {"max_steps": 150, "train_limit": 10240}
_FEW = {"max_steps": 2, "per_device_train_batch_size": 16, "train_limit": 64}
SCALES = {
    "smoke": Scale(
        TINY_CELL,
        "Every part once, in a minute; its numbers mean nothing",
        base_steps=12,
        sft={"max_steps": 6},
        train=_SMOKE,
        adaptive={"validation_size": 4},
        extra_arms=_ALL,
        distill=_FEW,
        minutes=1,
    ),
    "tiny": Scale(
        TINY_CELL,
        "Arithmetic on a CPU",
        base_steps=600,
        train={"eval_every": 2, "eval_limit": 500},
        extra_arms=_ALL,
        distill=_DISTILL,
        minutes=19,
    ),
} | {cell.replace("/", "-"): Scale(cell, "A cell of the paper, on GPUs") for cell in PAPER_CELLS}
SCALES["smollm2"] = Scale(SMOLLM2_CELL, "Word problems with SmolLM2-135M-Instruct on a CPU", minutes=75)


def load_scale(name: str) -> Scale:
    """The scale of that name. Raises `ValueError` for an unknown name, with the nearest known one."""
    if name not in SCALES:
        raise unknown_name("scale", name, SCALES)
    return SCALES[name]
