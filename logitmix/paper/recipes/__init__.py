"""Recipes: the settings of every run that the paper reports, as data. Each value says where it comes from.

`math/3b/fixed_mixing` is the cell `math/3b` (a task, a model) and an arm, or the stage `sft` that makes the anchor.
It is four layers of YAML in this folder, a later one over an earlier one:

    train.yaml (or sft.yaml)  <  models/3b.yaml  <  arms/fixed_mixing.yaml  <  tasks/math.yaml

A layer maps flags of `logitmix train` and `logitmix sft` to `[value, source, reason]`, the files of models and tasks
under `all`, `train`, `sft` or an arm's name, since all read them. The sources:

    P  the paper, arXiv 2605.20555
    C  the authors' code, github.com/xingweiGan/LAPO: it is for MATH with 3B; its values are taken for every cell
    O  our choice, always with the reason

In a text `{cell}` and `{arm}` are the recipe's, and `{model_name_or_path}` is the flag of that name, as it was given.
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
SOURCES = {"P": "paper", "C": "authors' code", "O": "our choice"}
SFT = "sft"
ARMS = tuple(sorted(path.stem for path in (FOLDER / "arms").glob("*.yaml")))
# What reports call the arms, in their order
TITLES = {
    "fixed_mixing": "fixed mixing",
    "adaptive_mixing": "adaptive mixing",
    "prob_mixing": "probability mixing",
    "base_anchor": "base anchor",
    "grpo_kl": "GRPO+KL",
    "grpo": "GRPO beta 0",
}
PAPER_CELLS = tuple(map("/".join, product(("math", "cn_k12", "mmlu"), ("1.5b", "3b", "7b"))))
CELLS = (*PAPER_CELLS, "arithmetic/tiny")  # the second for a laptop, where `logitmix quickstart` uses it
NAMES = tuple(f"{cell}/{arm}" for cell, arm in product(CELLS, (SFT, *ARMS)))

# Counted on each process: what a recipe says for one is divided among more, so that an update stays the same
PER_PROCESS = ("gradient_accumulation_steps", "steps_per_generation")


@dataclass(frozen=True)
class Value:
    """A flag's value, where it comes from (`P`, `C` or `O`), why, and the layer that says so."""

    value: Any
    source: str
    reason: str
    layer: str

    def __str__(self) -> str:
        return f"{self.layer}: {SOURCES[self.source]}" + (f", {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Recipe:
    """The settings of one run, by flag, and the model's `config.json` as far as sizes depend on it."""

    name: str
    values: dict[str, Value]
    model_config: dict[str, Any]

    @property
    def verb(self) -> str:
        """The command that it is for."""
        return "sft" if self.name.endswith(f"/{SFT}") else "train"

    def shared_by(self, num_processes: int) -> "Recipe":
        """The recipe with its batches shared among processes: the same rollouts (or examples) an update.

        Raises `ValueError` where they cannot be.
        """
        values = dict(self.values)
        for key in PER_PROCESS:
            value = values.get(key)
            if num_processes == 1 or value is None:
                continue
            if value.value % num_processes:
                possible = ", ".join(str(n) for n in range(1, value.value + 1) if value.value % n == 0)
                raise ValueError(
                    f"the recipe {self.name} has {key} {value.value}, which {num_processes} processes cannot share "
                    f"equally; use a number of processes that divides it: {possible}"
                )
            reason = f"{value.value} shared by {num_processes} processes; {value.reason}"
            values[key] = replace(value, value=value.value // num_processes, reason=reason)
        return replace(self, values=values)


@cache
def load_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises `ValueError` that names the nearest for one that does not exist."""
    if name not in NAMES:
        nearest = get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no recipe {name!r}; did you mean {nearest!r}? `logitmix recipes` lists them")
    task, model, arm = name.split("/")
    stage = SFT if arm == SFT else "train"
    layers = {
        stage: _read(stage),
        f"models/{model}": _sections(f"models/{model}", "all", stage),
        f"arms/{arm}": {} if arm == SFT else _read(f"arms/{arm}"),
        f"tasks/{task}": _sections(f"tasks/{task}", "all", stage, arm),
    }
    values = {}
    for layer, entries in layers.items():
        for key, (value, source, *reason) in entries.items():
            if isinstance(value, str):
                value = value.replace("{cell}", f"{task}/{model}").replace("{arm}", arm)
            values[key] = Value(value, source, "".join(reason), layer)
    return Recipe(name, values, _read(f"models/{model}")["config"])


def _sections(layer: str, *names: str) -> dict[str, Any]:
    """The flags of a layer that several stages and arms read, a later section over an earlier one."""
    content = _read(layer)
    return {key: entry for name in dict.fromkeys(names) for key, entry in content.get(name, {}).items()}


@cache
def _read(layer: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / f"{layer}.yaml").read_text())
    return content
