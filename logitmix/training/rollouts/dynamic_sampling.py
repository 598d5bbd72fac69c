"""Dynamic sampling (DAPO, arXiv 2503.14476): drop or replace questions whose rollouts all earn the same reward.

The advantages of such a group are 0. Without it, eq. 6's mean is over the remaining questions; further questions can
be sampled in its place.

Shape legend: Q questions of an outer step, G rollouts each, N = Q·G rollouts of all processes, F reward functions.
"""

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from trl import GRPOTrainer

from logitmix.training.batch import Batch, own_tokens

PADDED_LEFT = ("prompt_ids", "prompt_mask")


def has_spread(rewards_NF: Tensor, weights_F: Tensor, num_generations: int) -> Tensor:
    """`[Q]`: whether the rollouts of a question differ in reward, the weighted sum over the reward functions."""
    rewards_QG = (rewards_NF * weights_F.to(rewards_NF)).nansum(1).view(-1, num_generations)
    return rewards_QG.amax(1) > rewards_QG.amin(1)


class QuestionStream:
    """An endless stream of the training questions, reshuffled in each pass, for refills. Its state is one count."""

    def __init__(self, num_questions: int, seed: int) -> None:
        self.num_questions, self.seed, self.drawn = num_questions, seed, 0

    def draw(self, count: int) -> list[int]:
        """The indices of the next `count` questions."""
        indices: list[int] = []
        for i in range(self.drawn, self.drawn + count):
            epoch, position = divmod(i, self.num_questions)
            if position == 0 or not indices:
                order = list(range(self.num_questions))
                random.Random(f"refill {self.seed} {epoch}").shuffle(order)  # independent of the sampler's order
            indices.append(order[position])
        self.drawn += count
        return indices

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.drawn = state["drawn"]


def refill(
    trainer: GRPOTrainer,
    batch: Batch,
    spread_Q: Tensor,
    sample: Callable[[list[dict[str, Any]]], tuple[Batch, Tensor]],
    questions: QuestionStream,
    max_refills: int,
) -> tuple[Batch, Tensor]:
    """Replace the questions of `batch` without reward spread. Returns the batch and which questions have spread.

    `spread_Q` says which questions of the batch have spread. `sample` makes a batch of a process's rows and the
    rewards `[N, F]` of all processes. All processes call this function and agree, since they see all rewards. It
    samples at most `max_refills` times, as many questions as are missing; those still without spread are kept, with a
    warning. Metrics of the replacements are not logged.
    """
    accelerator, G = trainer.accelerator, trainer.num_generations
    metrics = trainer.step_metrics
    logged = {name: len(values) for name, values in metrics.items()}
    spread_Q = spread_Q.clone()
    num_rows = len(batch["prompt_ids"])
    pad_id = trainer.text_tokenizer.pad_token_id
    whole: Batch | None = None  # of all processes, once a question is replaced
    for _ in range(max_refills):
        missing = (~spread_Q).nonzero().flatten().tolist()
        if not missing:
            break
        indices = questions.draw(divisible_count(len(missing), G, accelerator.num_processes))
        rows = [trainer.train_dataset[i] for i in indices for _ in range(G)]
        share = len(rows) // accelerator.num_processes
        sampled, rewards_NF = sample(rows[accelerator.process_index * share :][:share])
        extra = gather_batch(sampled, accelerator, pad_id)
        found = has_spread(rewards_NF, trainer.reward_weights, G).nonzero().flatten().tolist()
        whole = gather_batch(batch, accelerator, pad_id) if whole is None else whole
        places = missing[: len(found)]
        whole = replace_groups(whole, extra, places, found[: len(places)], G, pad_id)
        spread_Q[places] = True
    for name, values in metrics.items():
        if name != "num_tokens":  # a running count
            del values[logged.get(name, 0) :]
    if not spread_Q.all() and accelerator.is_main_process:
        warnings.warn(
            f"after {max_refills} refills {int((~spread_Q).sum())} of {len(spread_Q)} questions are still without "
            "reward spread and do not count in the loss; raise max_refills, or check whether the task is too easy or "
            "too hard",
            stacklevel=2,
        )
    if whole is None:
        return batch, spread_Q
    start = accelerator.process_index * num_rows
    mine = {name: x[start : start + num_rows] for name, x in whole.items()}
    mine["num_items_in_batch"] = own_tokens(whole).sum()
    return mine, spread_Q


def divisible_count(num_questions: int, num_generations: int, num_processes: int) -> int:
    """The smallest number of questions, at least `num_questions`, whose rollouts divide evenly among the processes."""
    step = num_processes // math.gcd(num_processes, num_generations)
    return math.ceil(num_questions / step) * step


def gather_batch(batch: Batch, accelerator: Accelerator, pad_id: int) -> Batch:
    """The rows of a batch from all processes, in the order of the processes, without scalars of the whole batch."""
    rows = {name: x for name, x in batch.items() if not (isinstance(x, Tensor) and x.dim() == 0)}
    unsupported = [name for name, x in rows.items() if not isinstance(x, Tensor) or x.dim() > 2]
    if unsupported:
        raise ValueError(f"dynamic_sampling='refill' cannot exchange {', '.join(unsupported)}; use 'filter', or 'off'")
    return {
        name: accelerator.gather(
            accelerator.pad_across_processes(
                x, dim=1, pad_index=padding_value(name, pad_id), pad_first=name in PADDED_LEFT
            )
            if x.dim() == 2
            else x
        )
        for name, x in rows.items()
    }


def replace_groups(
    batch: Batch, extra: Batch, places: Sequence[int], sources: Sequence[int], num_generations: int, pad_id: int
) -> Batch:
    """`batch` with its groups `places` replaced by the groups `sources` of `extra`, padded to the wider of the two."""
    result = {}
    for name, old in batch.items():
        new = extra[name]
        if old.dim() == 2:
            width = max(old.shape[1], new.shape[1])
            old, new = (pad_to(x, width, padding_value(name, pad_id), name in PADDED_LEFT) for x in (old, new))
        groups = old.reshape(-1, num_generations, *old.shape[1:]).clone()
        groups[list(places)] = new.reshape(-1, num_generations, *new.shape[1:])[list(sources)]
        result[name] = groups.reshape(old.shape)
    return result


def pad_to(x: Tensor, width: int, value: int, left: bool) -> Tensor:
    """`x` padded with `value` to `width` columns, on the left or the right."""
    gap = width - x.shape[1]
    return torch.nn.functional.pad(x, (gap, 0) if left else (0, gap), value=value)


def padding_value(name: str, pad_id: int) -> int:
    """The value that TRL pads a tensor of this name with."""
    return pad_id if name in ("prompt_ids", "completion_ids") else int(name == "tool_mask")
