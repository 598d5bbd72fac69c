"""The scales of `logitmix reproduce`, and the stages each consists of."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitmix.paper.recipes import ARMS, PAPER_CELLS, SFT, load_recipe
from logitmix.runs.files import SWEEP_FILE
from logitmix.tasks.names import unknown_name

BASE = "base"
SWEEP = "sweep"
LAST_FILE = "training_args.bin"  # a trainer writes it last into the folder of its model


@dataclass(frozen=True)
class Preset:
    """A cell of the recipes, and the settings that differ from them.

    With `base_steps` the base model is trained here, as in the quickstart; without, it is the recipe's.
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
    """A part of a reproduction: a command with its settings, which writes the file `last` when it is complete."""

    seed: int
    kind: str
    verb: str
    settings: dict[str, Any]
    folder: Path
    last: str = LAST_FILE

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.kind}"

    @property
    def is_complete(self) -> bool:
        return (self.folder / self.last).exists()

    @property
    def command(self) -> list[str]:
        """The command line that runs this stage by hand."""
        flags = [word for key, value in self.settings.items() for word in (f"--{key}", str(value))]
        return ["logitmix", self.verb, *flags]


def load_preset(name: str) -> Preset:
    """The preset of that name. Raises `ValueError`, which names the nearest one, for an unknown name."""
    if name not in PRESETS:
        raise unknown_name("scale", name, PRESETS)
    return PRESETS[name]


def stages(preset: Preset, seeds: int, folder: Path, eval_limit: int | None = None) -> list[Stage]:
    """All stages in order. For each seed: the base if it is trained here, the SFT model, the sweep, and every arm."""
    return [s for seed in range(seeds) for s in _stages_of_seed(preset, seed, folder / f"seed-{seed}", eval_limit)]


def _stages_of_seed(preset: Preset, seed: int, folder: Path, eval_limit: int | None) -> list[Stage]:
    recipes = {
        arm: {k: v.value for k, v in load_recipe(f"{preset.cell}/{arm}").values.items()} for arm in (SFT, *ARMS)
    }
    any_arm = recipes["fixed_mixing"] | preset.train
    limit = any_arm["eval_limit"] if eval_limit is None else eval_limit
    base, anchor = recipes[SFT]["model_name_or_path"], recipes[SFT]["output_dir"]
    # where this reproduction keeps the models that the recipes name
    folders = {base: base if preset.base_steps is None else folder / BASE, anchor: folder / SFT}

    def settings(arm: str, **others: Any) -> dict[str, Any]:
        models = {key: recipes[arm].get(key) for key in ("model_name_or_path", "anchor")}
        own: dict[str, Any] = {"recipe": f"{preset.cell}/{arm}", "seed": seed, "output_dir": folder / arm}
        return own | {key: folders[name] for key, name in models.items() if name in folders} | others

    sweep = {
        "model_name_or_path": folders[base],
        "anchor": folders[anchor],
        "task": any_arm["task"],
        "eval_limit": limit,
        "max_new_tokens": any_arm["max_completion_length"],
        "batch_size": any_arm["rollout_batch_size"] or 256,
        "dtype": "bfloat16" if any_arm["bf16"] else "float32",
        "output_dir": folder / SWEEP,
    }
    train = preset.train | {"eval_limit": limit}
    return [
        *([Stage(seed, BASE, BASE, {"max_steps": preset.base_steps}, folder / BASE)] if preset.base_steps else []),
        Stage(seed, SFT, "sft", settings(SFT, **preset.sft), folder / SFT),
        Stage(seed, SWEEP, "sweep", sweep, folder / SWEEP, last=SWEEP_FILE),
        *(Stage(seed, arm, "train", settings(arm, **train), folder / arm) for arm in ARMS),
    ]
