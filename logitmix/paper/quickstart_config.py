"""The configuration of the quickstart."""

from dataclasses import dataclass, field

from logitmix.paper.recipes import TITLES
from logitmix.tasks.names import unknown_name


@dataclass
class QuickstartConfig:
    """Quickstart

    The default sizes take a few minutes on two CPU cores.
    """

    output_dir: str = field(
        default="runs/quickstart", metadata={"help": "New folder for models, figures and numbers."}
    )
    arms: list[str] = field(
        default_factory=lambda: ["fixed_mixing", "grpo_kl"],
        metadata={"help": f"Arms to train: 'all', or some of {', '.join(TITLES)}."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of data, initial weights and rollouts."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of the anchor in training."})
    base_steps: int = field(default=600, metadata={"help": "Updates that train the base model, 64 solutions each."})
    sft_steps: int = field(default=100, metadata={"help": "Updates that train the anchor, 64 demonstrations each."})
    rl_steps: int = field(default=40, metadata={"help": "Training steps of each arm."})
    questions: int = field(default=32, metadata={"help": "Questions in a training step."})
    num_generations: int = field(default=8, metadata={"help": "Rollouts of each question."})
    rl_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of every arm."})
    eval_limit: int = field(default=200, metadata={"help": "Number of test problems in each evaluation."})
    eval_every: int = field(default=4, metadata={"help": "Training steps between evaluations."})

    @property
    def arm_names(self) -> list[str]:
        return list(TITLES) if self.arms == ["all"] else list(dict.fromkeys(self.arms))

    def __post_init__(self) -> None:
        """Raises `ValueError` for values that would otherwise only fail minutes later."""
        for name, value in vars(self).items():
            if isinstance(value, int) and name != "seed" and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; training needs 0 <= alpha < 1")
        for arm in self.arm_names:
            if arm not in TITLES:
                raise unknown_name("arm", arm, TITLES)
