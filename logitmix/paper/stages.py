"""The stages of a reproduction: what is run, in which order, with which settings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitmix.paper.recipes import ARMS, DISTILLED, EXTRA_ARMS, EXTRA_TITLES, SFT, load_recipe
from logitmix.paper.scales import Scale
from logitmix.runs.files import SWEEP_FILE
from logitmix.tasks.names import unknown_name

BASE = "base"
SWEEP = "sweep"
DISTILL_REPORT = "report"  # the folder within the stage's
# The settings of fixed mixing that the distillation of its mixture shares
SHARED = (
    *("task", "data", "max_completion_length", "gradient_accumulation_steps", "per_device_train_batch_size"),
    *("learning_rate", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "temperature"),
    *("gradient_checkpointing", "bf16", "dtype", "use_cpu", "max_steps", "logging_steps"),
    *("save_strategy", "save_steps", "save_total_limit", "use_peft", "lora_r", "lora_alpha"),
)
LAST_FILE = "training_args.bin"  # the last file that a trainer writes into the folder of its model


@dataclass(frozen=True)
class Stage:
    """A part of a reproduction, complete once it has written `last_file` into its folder.

    seed:     of the run
    kind:     `"base"`, `"sft"`, `"sweep"`, an arm or `"distilled"`; the name of its folder
    verb:     the command that makes it; `"base"` is made by `paper.tiny_training`
    recipe:   name of the recipe, if the command takes one
    settings: values that differ from the recipe or from the command's defaults, by flag
    """

    seed: int
    kind: str
    verb: str
    recipe: str | None
    settings: Mapping[str, Any]
    folder: Path
    last_file: str = LAST_FILE

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.kind}"

    @property
    def is_complete(self) -> bool:
        return (self.folder / self.last_file).exists()

    @property
    def command(self) -> list[str]:
        """The command line that makes the stage by hand."""
        settings = ({} if self.recipe is None else {"recipe": self.recipe}) | dict(self.settings)
        words = ((f"--{key}", *(value if isinstance(value, list) else [value])) for key, value in settings.items())
        return ["logitmix", self.verb, *(str(word) for flag in words for word in flag)]


def plan_stages(
    scale: Scale,
    seeds: Iterable[int],
    folder: Path,
    eval_limit: int | None = None,
    decoding: str | None = None,
    extra_arms: Sequence[str] | None = None,
) -> list[Stage]:
    """All stages in order: for each seed a base model (if it is made here), an SFT model, a sweep, the arms.

    `extra_arms` are those beyond the paper, by default the scale's. Raises `ValueError` for an unknown one.
    """
    extra = scale.extra_arms if extra_arms is None else tuple(dict.fromkeys(extra_arms))
    for arm in extra:
        if arm not in EXTRA_TITLES:
            raise unknown_name("extra arm", arm, EXTRA_TITLES)
    return [
        stage
        for seed in seeds
        for stage in _plan_seed(scale, seed, folder / f"seed-{seed}", eval_limit, decoding, extra)
    ]


def _plan_seed(
    scale: Scale, seed: int, folder: Path, eval_limit: int | None, decoding: str | None, extra: Sequence[str]
) -> list[Stage]:
    recipes = {arm: load_recipe(f"{scale.cell}/{arm}") for arm in (SFT, *ARMS, *EXTRA_ARMS)}
    arm_settings = recipes["fixed_mixing"].settings(scale.train)
    limit = arm_settings["eval_limit"] if eval_limit is None else eval_limit
    base, anchor = (recipes[SFT].values[key].value for key in ("model_name_or_path", "output_dir"))
    # the models that recipes name, and where this reproduction has them
    models = {base: base if scale.base_steps is None else str(folder / BASE), anchor: str(folder / SFT)}

    def stage(kind: str, verb: str, changes: Mapping[str, Any]) -> Stage:
        named = {key: value.value for key, value in recipes[kind].values.items()}
        own = {key: named[key] for key in ("model_name_or_path", "anchor") if named.get(key) in models}
        settings = {"seed": seed, "output_dir": str(folder / kind)}
        settings |= {key: models[model] for key, model in own.items()} | dict(changes)
        return Stage(seed, kind, verb, recipes[kind].name, settings, folder / kind)

    sweep = {
        "model_name_or_path": models[base],
        "anchor": models[anchor],
        "task": arm_settings["task"],
        "eval_limit": limit,
        "max_new_tokens": arm_settings["max_completion_length"],
        "batch_size": arm_settings["rollout_batch_size"] or 256,
        "dtype": "bfloat16" if arm_settings["bf16"] else "float32",
        "output_dir": str(folder / SWEEP),
    }
    if arm_settings.get("use_peft"):
        sweep["mixes"] = ["logit", "prob"]  # members that share one base have no weights of their own to merge
    of_mixtures = {} if decoding is None else {"decoding": decoding}

    def arm(name: str) -> Stage:
        changes = scale.train | {"eval_limit": limit} | (scale.adaptive if name == "adaptive_mixing" else {})
        return stage(name, "train", changes | (of_mixtures if "anchor" in recipes[name].values else {}))

    distill = {key: arm_settings[key] for key in SHARED if arm_settings.get(key) is not None} | scale.distill
    distill |= {"model_name_or_path": str(folder / "fixed_mixing"), "seed": seed, "eval_limit": limit}
    distill |= {"output_dir": str(folder / DISTILLED)} | of_mixtures
    last = f"{DISTILL_REPORT}/distillation.jsonl"
    distilled = Stage(seed, DISTILLED, "distill", None, distill, folder / DISTILLED, last_file=last)
    made_here = [Stage(seed, BASE, BASE, None, {"max_steps": scale.base_steps}, folder / BASE)]
    return [
        *(made_here if scale.base_steps else []),
        stage(SFT, "sft", scale.sft),
        Stage(seed, SWEEP, "sweep", None, sweep | of_mixtures, folder / SWEEP, last_file=SWEEP_FILE),
        *map(arm, ARMS),
        *(distilled if name == DISTILLED else arm(name) for name in extra),
    ]
