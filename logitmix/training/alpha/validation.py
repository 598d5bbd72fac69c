"""Validation between outer steps: which questions, and how many the policy, the mixture and the anchor answer."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl.data_utils import is_conversational

from logitmix.training.alpha.controllers import VALIDATING, Counts
from logitmix.training.config import LogitMixGRPOConfig

if TYPE_CHECKING:
    from logitmix.training.grpo import LogitMixGRPOTrainer

Rows = Sequence[Mapping[str, Any]]


def validation_questions(
    trainer: "LogitMixGRPOTrainer", held_out: Dataset | None
) -> "HeldOut | FreshQuestions | None":
    """Where the controller validates: the questions of `held_out`, or else training questions."""
    args, dataset = trainer.args, trainer.train_dataset
    if args.alpha_controller not in VALIDATING:
        return None
    if held_out is not None:
        return HeldOut(held_out, args.validation_size)
    if not isinstance(dataset, Dataset):
        raise ValueError("a streamed train_dataset has no questions to leave out; give a validation_dataset")
    if args.dynamic_sampling == "refill":
        raise ValueError(
            "dynamic_sampling 'refill' draws from all training questions, so also from those that validation takes; "
            "give a validation_dataset"
        )
    return FreshQuestions(
        dataset,
        questions=args.generation_batch_size // trainer.num_generations,
        size=args.validation_size,
        repeats=trainer.num_generations,
        passes=trainer.num_iterations * args.steps_per_generation,
        seed=args.seed if trainer.shuffle_dataset else None,
        outer_steps_done=lambda: trainer.state.global_step // updates_per_outer_step(args),
    )


def updates_per_outer_step(args: LogitMixGRPOConfig) -> int:
    """Optimizer steps of an outer step."""
    return args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps


class HeldOut:
    """The same questions after every outer step."""

    def __init__(self, dataset: Dataset, size: int) -> None:
        if len(dataset) < size:
            raise ValueError(
                f"validation_size is {size}, but validation_dataset has {len(dataset)} questions; lower "
                "validation_size or give more"
            )
        self.rows = [dataset[i] for i in range(size)]

    def after(self, generation: int) -> Rows:
        return self.rows


class FreshQuestions(Sampler[int]):
    """The order of training questions, with `size` questions after each generation's left out for its validation.

    A pass takes the questions in an order of its own and cuts it into runs of `questions + size`: the first are
    trained on, as TRL's `RepeatSampler` would give them, the others are what `after` returns. So a question is
    either trained on in a pass, or validated on, or (the last few) neither.

    Args:
        questions: of a generation.
        repeats, passes: how often a question stands in a generation, and a generation in the updates.
        seed: of the order; None keeps the data's.
        outer_steps_done: since the run's start; asked at the start of each pass, so that a resumed run finds its own.
    """

    def __init__(
        self,
        dataset: Dataset,
        questions: int,
        size: int,
        repeats: int,
        passes: int,
        seed: int | None,
        outer_steps_done: Callable[[], int],
    ) -> None:
        if len(dataset) < questions + size:
            raise ValueError(
                f"the data set has {len(dataset)} questions, fewer than the {questions} of a generation step and "
                f"the {size} of validation_size; lower validation_size, use more data, or give a validation_dataset"
            )
        self.dataset, self.questions, self.size = dataset, questions, size
        self.repeats, self.passes, self.seed, self.outer_steps_done = repeats, passes, seed, outer_steps_done
        self.outer_steps = len(dataset) // (questions + size)

    def after(self, generation: int) -> Rows:
        """The validation questions that follow a generation, counted from 0 over the whole run."""
        return [self.dataset[i] for i in self._run(generation)[self.questions :]]

    def _run(self, generation: int) -> list[int]:
        number, i = divmod(generation, self.outer_steps)
        order = torch.arange(len(self.dataset))
        if self.seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed + number))
        length = self.questions + self.size
        return order[i * length : (i + 1) * length].tolist()

    def __iter__(self) -> Iterator[int]:
        first = self.outer_steps_done() // self.outer_steps * self.outer_steps
        for generation in range(first, first + self.outer_steps):
            trained_on = self._run(generation)[: self.questions]
            for _ in range(self.passes):
                yield from (i for i in trained_on for _ in range(self.repeats))

    def __len__(self) -> int:
        return self.outer_steps * self.questions * self.repeats * self.passes


def validate(trainer: "LogitMixGRPOTrainer", rows: Rows, alpha: float, with_anchor: bool) -> Counts:
    """Greedy responses of the policy, the mixture at `alpha` and, if asked, the anchor, counted (eq. 7-8).

    All of a process's responses are one batch with an alpha a sequence. A response is correct where the weighted sum
    of the trainer's rewards reaches 1, so the paper's reward is its `c`.

    Processes share the questions, each the same number: one that has too few repeats some, which are not counted.
    The rewards of all are known to all, so every process comes to the same counts.
    """
    processes, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    share = math.ceil(len(rows) / processes)
    mine = [rows[(rank + i * processes) % len(rows)] for i in range(share)]
    alphas = [0.0, alpha, 1.0] if with_anchor else [0.0, alpha]
    asked = mine * len(alphas)
    was_training = trainer.model.training
    trainer.model.eval()  # no dropout, which would also draw random numbers
    prompts = [row["prompt"] for row in asked]
    completion_ids = trainer.decode_greedy(
        trainer.tokenize_prompts(prompts), [alpha for alpha in alphas for _ in mine]
    )
    completions: list[Any] = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    if is_conversational(asked[0]):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    rewards_NF = trainer.unlogged_rewards(asked, prompts, completions, completion_ids)
    trainer.model.train(was_training)
    rewards_N = (rewards_NF * trainer.reward_weights.to(rewards_NF.device)).nansum(1)
    # gathered by process, then alpha, then question; question i was asked by process i % processes
    correct = (rewards_N >= 1).view(processes, len(alphas), share).permute(1, 2, 0).flatten(1)[:, : len(rows)]
    policy, mixture = correct[0], correct[1]
    return Counts(
        n=len(rows),
        policy=int(policy.sum()),
        mixture=int(mixture.sum()),
        forgetting=int((policy & ~mixture).sum()),
        gain=int((~policy & mixture).sum()),
        anchor=int(correct[2].sum()) if with_anchor else None,
    )
