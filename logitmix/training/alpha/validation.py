"""Validation between outer steps: which questions, and how many of them each model answers correctly."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl import GRPOTrainer
from trl.data_utils import is_conversational

from logitmix.training.alpha.controllers import VALIDATING, Counts
from logitmix.training.config import updates_per_outer_step
from logitmix.training.process_shares import process_share

Rows = Sequence[Mapping[str, Any]]


def validation_questions(trainer: GRPOTrainer, held_out: Dataset | None) -> "HeldOut | FreshQuestions | None":
    """The questions to validate on: those of `held_out` if given, or else training questions."""
    args, dataset = trainer.args, trainer.train_dataset
    if args.alpha_controller not in VALIDATING:
        return None
    if held_out is not None:
        return HeldOut(held_out, args.validation_size)
    if not isinstance(dataset, Dataset):
        raise ValueError("a streamed train_dataset has no questions to set aside; give a validation_dataset")
    if args.dynamic_sampling == "refill":
        raise ValueError(
            "dynamic_sampling 'refill' draws from all training questions, including those used for validation; give a "
            "validation_dataset"
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


class HeldOut:
    """The same questions after every outer step."""

    def __init__(self, dataset: Dataset, size: int) -> None:
        if len(dataset) < size:
            raise ValueError(
                f"validation_size is {size}, but validation_dataset has {len(dataset)} questions; lower "
                "validation_size or give more"
            )
        self.rows = [dataset[i] for i in range(size)]

    def after(self, outer_step: int) -> Rows:
        return self.rows


class FreshQuestions(Sampler[int]):
    """A sampler of training questions that sets `size` questions aside for validation after each outer step.

    Each pass shuffles the questions and splits them into windows of `questions + size`. The first `questions` of a
    window are trained on, in the order of TRL's `RepeatSampler`; `after` returns the others. In a pass, a question is
    either trained on, or validated on, or (the last few) unused.

    Args:
        questions: number of questions in an outer step.
        repeats: rollouts per question.
        passes: how many times the updates go through the rollouts of an outer step.
        seed: seed of the order; None keeps the data's order.
        outer_steps_done: the number of outer steps since the start of the run. It is called at the start of each
            pass, so that a resumed run continues its order.
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
                f"the data set has {len(dataset)} questions, fewer than the {questions} of an outer step and "
                f"the {size} of validation_size; lower validation_size, use more data, or give a validation_dataset"
            )
        self.dataset, self.questions, self.size = dataset, questions, size
        self.repeats, self.passes, self.seed, self.outer_steps_done = repeats, passes, seed, outer_steps_done
        self.outer_steps = len(dataset) // (questions + size)

    def after(self, outer_step: int) -> Rows:
        """The validation questions after an outer step, counted from 0 over the whole run."""
        return [self.dataset[i] for i in self._window(outer_step)[self.questions :]]

    def _window(self, outer_step: int) -> list[int]:
        pass_number, i = divmod(outer_step, self.outer_steps)
        order = torch.arange(len(self.dataset))
        if self.seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed + pass_number))
        length = self.questions + self.size
        return order[i * length : (i + 1) * length].tolist()

    def __iter__(self) -> Iterator[int]:
        first = self.outer_steps_done() // self.outer_steps * self.outer_steps
        for outer_step in range(first, first + self.outer_steps):
            trained_on = self._window(outer_step)[: self.questions]
            for _ in range(self.passes):
                yield from (i for i in trained_on for _ in range(self.repeats))

    def __len__(self) -> int:
        return self.outer_steps * self.questions * self.repeats * self.passes


def validate(trainer: GRPOTrainer, rows: Rows, alpha: float, with_anchor: bool) -> Counts:
    """Count the correct greedy responses of policy, mixture at `alpha` and, if wanted, anchor (eq. 7-8).

    A process decodes its responses in one batch with an alpha per sequence. A response is correct if the weighted sum
    of the trainer's rewards reaches 1, so the paper's reward is its `c`.

    Processes share the questions equally; repeated ones at the end are not counted. All processes see all rewards,
    so they agree on the counts.
    """
    share = process_share(len(rows), trainer.accelerator)
    mine = [rows[i % len(rows)] for i in share]
    alphas = [0.0, alpha, 1.0] if with_anchor else [0.0, alpha]
    requests = mine * len(alphas)
    was_training = trainer.model.training
    trainer.model.eval()  # without dropout, which would draw random numbers
    prompts = [row["prompt"] for row in requests]
    completion_ids = trainer.decode_greedy(
        trainer.tokenize_prompts(prompts), [alpha for alpha in alphas for _ in mine]
    )
    completions: list[Any] = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    if is_conversational(requests[0]):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    rewards_NF = trainer.unlogged_rewards(requests, prompts, completions, completion_ids)
    trainer.model.train(was_training)
    rewards_N = (rewards_NF * trainer.reward_weights.to(rewards_NF.device)).nansum(1)
    # gathered by process, then alpha, then question: `[P, alphas, share]`
    correct = (rewards_N >= 1).view(-1, len(alphas), len(share)).permute(1, 2, 0).flatten(1)[:, : len(rows)]
    policy, mixture = correct[0], correct[1]
    return Counts(
        n=len(rows),
        policy=int(policy.sum()),
        mixture=int(mixture.sum()),
        forgetting=int((policy & ~mixture).sum()),
        gain=int((~policy & mixture).sum()),
        anchor=int(correct[2].sum()) if with_anchor else None,
    )
