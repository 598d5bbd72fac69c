"""The scales of `logitmix reproduce`: what is run, as commands of logitmix, one after the other."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from logitmix.paper.recipes import ARMS, PAPER_CELLS, SFT, load_recipe
from logitmix.runs.files import SWEEP_FILE

BASE = "base"
SWEEP = "sweep"
LAST_FILE = "training_args.bin"  # what a trainer writes last into the folder of its model


@dataclass(frozen=True)
class Preset:
    """A cell of the recipes, and what is to be other than they say, by flag.

    With `base_steps` the base model is made here, as in the quickstart; without, it is the recipe's.
    """

    cell: str
    about: str
    base_steps: int | None = None
    sft: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


_SMOKE = {"max_steps": 2, "per_device_train_batch_size": 16, "num_generations": 4, "eval_every": 1}
_SMOKE |= {"eval_limit": 8, "validation_size": 4}
PRESETS = {
    "smoke": Preset(
        "arithmetic/tiny", "Every part once, in a minute; its numbers mean nothing", 12, {"max_steps": 6}, _SMOKE
    ),
    "tiny": Preset("arithmetic/tiny", "Arithmetic on a CPU", 600, {}, {"eval_every": 2, "eval_limit": 500}),
} | {cell.replace("/", "-"): Preset(cell, "A cell of the paper, on GPUs") for cell in PAPER_CELLS}


@dataclass(frozen=True)
class Stage:
    """A part of a reproduction that is either whole or not: a command that ends by writing the file `last`."""

    seed: int
    kind: str
    verb: str
    flags: dict[str, Any]
    folder: Path
    last: str = LAST_FILE

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.kind}"

    @property
    def is_whole(self) -> bool:
        return (self.folder / self.last).exists()

    @property
    def argv(self) -> list[str]:
        return [string for key, value in self.flags.items() for string in (f"--{key}", str(value))]


def load_preset(name: str) -> Preset:
    """The scale of that name. Raises `ValueError` that names the nearest for one that does not exist."""
    if name not in PRESETS:
        nearest = get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no scale {name!r}; did you mean {nearest!r}? The scales are {', '.join(PRESETS)}")
    return PRESETS[name]


def stages(scale: Preset, seeds: int, folder: Path, eval_limit: int | None = None) -> list[Stage]:
    """All stages in order: seed by seed the base where it is made here, the SFT model, the sweep, and every arm."""
    return [stage for seed in range(seeds) for stage in _of_seed(scale, seed, folder / f"seed-{seed}", eval_limit)]


def _of_seed(scale: Preset, seed: int, folder: Path, eval_limit: int | None) -> list[Stage]:
    recipes = {arm: {k: v.value for k, v in load_recipe(f"{scale.cell}/{arm}").values.items()} for arm in (SFT, *ARMS)}
    any_arm = recipes["fixed_mixing"] | scale.train
    limit = any_arm["eval_limit"] if eval_limit is None else eval_limit
    base, anchor = recipes[SFT]["model_name_or_path"], recipes[SFT]["output_dir"]
    # where the recipes' models are here
    made = {base: base if scale.base_steps is None else folder / BASE, anchor: folder / SFT}

    def recipe(arm: str, **others: Any) -> dict[str, Any]:
        models = {key: recipes[arm].get(key) for key in ("model_name_or_path", "anchor")}
        flags: dict[str, Any] = {"recipe": f"{scale.cell}/{arm}", "seed": seed, "output_dir": folder / arm}
        return flags | {key: made[name] for key, name in models.items() if name in made} | others

    swept = {
        "model_name_or_path": made[base],
        "anchor": made[anchor],
        "task": any_arm["task"],
        "eval_limit": limit,
        "max_new_tokens": any_arm["max_completion_length"],
        "batch_size": any_arm["rollout_batch_size"] or 256,
        "dtype": "bfloat16" if any_arm["bf16"] else "float32",
        "output_dir": folder / SWEEP,
    }
    return [
        *([Stage(seed, BASE, BASE, {"max_steps": scale.base_steps}, folder / BASE)] if scale.base_steps else []),
        Stage(seed, SFT, "sft", recipe(SFT, **scale.sft), folder / SFT),
        Stage(seed, SWEEP, "sweep", swept, folder / SWEEP, last=SWEEP_FILE),
        *(Stage(seed, arm, "train", recipe(arm, **scale.train | {"eval_limit": limit}), folder / arm) for arm in ARMS),
    ]
