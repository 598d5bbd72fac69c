"""Recipes: the settings of every run that the paper reports, as data. Each value names its source.

A recipe is a cell (a task and a model) and an arm, such as `math/3b/fixed_mixing`, or a cell and the stage `sft`,
which makes the anchor. It is merged from four layers of YAML in this folder, later over earlier:

    train.yaml (or sft.yaml)  <  models/3b.yaml  <  arms/fixed_mixing.yaml  <  tasks/math.yaml

A layer maps flags of `logitmix train` and `logitmix sft` to `[value, source, reason]`. The files of models and tasks
are read by every stage and arm, and group their flags under `all`, `train`, `sft` or the name of an arm. The sources:

    P  the paper, arXiv 2605.20555
    C  the authors' code, github.com/xingweiGan/LAPO, written for MATH with 3B; its values are used for every cell
    O  our choice, always with the reason

In a string value, `{cell}` and `{arm}` are replaced by the recipe's own, and `{model_name_or_path}` by the value of
that flag, which may come from the user.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml

from logitmix.tasks.names import unknown_name

FOLDER = Path(__file__).parent
SOURCES = {"P": "paper", "C": "authors' code", "O": "our choice"}
SFT = "sft"
EXTRA_ARMS = ("anneal", "policy_target")  # beyond the paper
ARMS = tuple(sorted({path.stem for path in (FOLDER / "arms").glob("*.yaml")} - {*EXTRA_ARMS}))
# Names of the arms in reports, in the order of reports
TITLES = {
    "fixed_mixing": "fixed mixing",
    "adaptive_mixing": "adaptive mixing",
    "prob_mixing": "probability mixing",
    "base_anchor": "base anchor",
    "grpo_kl": "GRPO+KL",
    "grpo": "GRPO beta 0",
}
DISTILLED = "distilled"  # one model out of the mixture of fixed mixing, made by `logitmix distill`
EXTRA_TITLES = {
    DISTILLED: "distilled fixed mixing",
    "anneal": "alpha annealed to 0",
    "policy_target": "policy target, alpha to 0",
}
PAPER_CELLS = tuple(map("/".join, product(("math", "cn_k12", "mmlu"), ("1.5b", "3b", "7b"))))
TINY_CELL = "arithmetic/tiny"  # for a laptop; `logitmix quickstart` trains it
SMOLLM2_CELL = "word_problems/smollm2"  # a real model on a CPU; `logitmix fetch-example` fetches it
CELLS = (*PAPER_CELLS, TINY_CELL, SMOLLM2_CELL)
NAMES = tuple(f"{cell}/{arm}" for cell, arm in product(CELLS, (SFT, *ARMS, *EXTRA_ARMS)))

# Counted per process: several processes divide the recipe's value, which is for one, so that an update stays the same
PER_PROCESS = ("gradient_accumulation_steps", "steps_per_generation")
POLICY = "{model_name_or_path}"

Config = TypeVar("Config")


@dataclass(frozen=True)
class Value:
    """The value of a flag, its source (`P`, `C` or `O`), the reason, and the layer it is from."""

    value: Any
    source: str
    reason: str
    layer: str

    def __str__(self) -> str:
        return f"{self.layer}: {SOURCES[self.source]}" + (f", {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Recipe:
    """The settings of one run, by flag, and the entries of the model's `config.json` that determine its size."""

    name: str
    values: dict[str, Value]
    model_config: dict[str, Any]

    @property
    def verb(self) -> str:
        """The command that the recipe is for."""
        return "sft" if self.name.endswith(f"/{SFT}") else "train"

    def settings(self, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The values by flag, with `changes` over them."""
        return resolve_policy({key: value.value for key, value in self.values.items()} | dict(changes or {}))

    def divided_among(self, num_processes: int) -> "Recipe":
        """The recipe for several processes, with as many rollouts (or examples) an update as for one.

        Raises `ValueError` if the batches cannot be divided equally.
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
            reason = f"{value.value} divided among {num_processes} processes; {value.reason}"
            values[key] = replace(value, value=value.value // num_processes, reason=reason)
        return replace(self, values=values)


@cache
def load_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises `ValueError` for an unknown name, with the nearest known one."""
    if name not in NAMES:
        raise unknown_name("recipe", name, NAMES, "`logitmix recipes` lists them")
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


def resolve_policy(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the value `{model_name_or_path}` replaced by the policy's."""
    return {key: settings["model_name_or_path"] if value == POLICY else value for key, value in settings.items()}


def configure(config_type: type[Config], settings: Mapping[str, Any]) -> Config:
    """An instance of the dataclass from those of the settings that are its fields; the others are ignored."""
    names = [field.name for field in fields(config_type) if field.init]  # type: ignore[arg-type]
    return config_type(**{name: settings[name] for name in names if name in settings})


def _sections(layer: str, *names: str) -> dict[str, Any]:
    """The flags in the named sections of a layer, later sections over earlier ones."""
    content = _read(layer)
    return {key: entry for name in dict.fromkeys(names) for key, entry in content.get(name, {}).items()}


@cache
def _read(layer: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / f"{layer}.yaml").read_text())
    return content
