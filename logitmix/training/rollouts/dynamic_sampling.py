"""Dynamic sampling (DAPO, arXiv 2503.14476): questions whose rollouts all earn the same teach nothing.

Such a group has advantage 0 throughout. It can leave the loss, whose mean over questions (eq. 6) is then over those
that stay, and further questions can take its place.

Shape legend: Q questions of a generation step, G rollouts each, N = Q·G rollouts of all processes, F reward functions.
"""

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor

if TYPE_CHECKING:
    from logitmix.training.trl_patches import PatchedGRPOTrainer

Batch = dict[str, Any]

PADDED_LEFT = ("prompt_ids", "prompt_mask")


def has_spread(rewards_NF: Tensor, weights_F: Tensor, num_generations: int) -> Tensor:
    """`[Q]`: whether a question's rollouts differ in their reward, the weighted sum of what the functions gave."""
    rewards_QG = (rewards_NF * weights_F.to(rewards_NF)).nansum(1).view(-1, num_generations)
    return rewards_QG.amax(1) > rewards_QG.amin(1)


class QuestionStream:
    """The training questions in an order of its own, over and over, for refills. Its whole state is a count."""

    def __init__(self, num_questions: int, seed: int) -> None:
        self.num_questions, self.seed, self.drawn = num_questions, seed, 0

    def draw(self, count: int) -> list[int]:
        """The indices of the next `count` questions."""
        indices: list[int] = []
        for i in range(self.drawn, self.drawn + count):
            epoch, position = divmod(i, self.num_questions)
            if position == 0 or not indices:
                order = list(range(self.num_questions))
                random.Random(f"refill {self.seed} {epoch}").shuffle(order)  # another order than the sampler's
            indices.append(order[position])
        self.drawn += count
        return indices

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.drawn = state["drawn"]


def refill(
    trainer: "PatchedGRPOTrainer",
    batch: Batch,
    spread_Q: Tensor,
    sample: Callable[[list[dict[str, Any]]], tuple[Batch, Tensor]],
    questions: QuestionStream,
    max_refills: int,
) -> tuple[Batch, Tensor]:
    """The process's `batch` with other questions in the places of those without spread, and which places have one.

    `sample` makes a batch of rows of the data set, a process's share of them; `rewards` tells those `[N, F]` of the
    batch made last. Called by all processes, which agree since they see all rewards. Further questions are sampled at
    most `max_refills` times, each time as many as are missing; what is still without spread then stays, with a
    warning. The log is of the step's own questions.
    """
    accelerator, G = trainer.accelerator, trainer.num_generations
    metrics = trainer.step_metrics
    logged = {name: len(values) for name, values in metrics.items()}
    spread_Q = spread_Q.clone()
    num_rows = len(batch["prompt_ids"])
    pad_id = trainer.text_tokenizer.pad_token_id
    whole: Batch | None = None  # of all processes, once a place has to change
    for _ in range(max_refills):
        missing = (~spread_Q).nonzero().flatten().tolist()
        if not missing:
            break
        indices = questions.draw(shareable(len(missing), G, accelerator.num_processes))
        rows = [trainer.train_dataset[i] for i in indices for _ in range(G)]
        share = len(rows) // accelerator.num_processes
        sampled, rewards_NF = sample(rows[accelerator.process_index * share :][:share])
        extra = gathered(sampled, accelerator, pad_id)
        found = has_spread(rewards_NF, trainer.reward_weights, G).nonzero().flatten().tolist()
        whole = gathered(batch, accelerator, pad_id) if whole is None else whole
        places = missing[: len(found)]
        whole = replaced(whole, extra, places, found[: len(places)], G, pad_id)
        spread_Q[places] = True
    for name, values in metrics.items():
        if name != "num_tokens":  # a running count
            del values[logged.get(name, 0) :]
    if not spread_Q.all() and accelerator.is_main_process:
        warnings.warn(
            f"after {max_refills} refills {int((~spread_Q).sum())} of {len(spread_Q)} questions are still without "
            "reward spread, and leave the loss; raise max_refills, or look whether the task is too easy or too hard",
            stacklevel=2,
        )
    if whole is None:
        return batch, spread_Q
    start = accelerator.process_index * num_rows
    mine = {name: x[start : start + num_rows] for name, x in whole.items()}
    mine["num_items_in_batch"] = (whole["completion_mask"] * whole.get("tool_mask", 1)).sum()
    return mine, spread_Q


def shareable(num_questions: int, num_generations: int, num_processes: int) -> int:
    """The least number of questions, not below `num_questions`, whose rollouts the processes share evenly."""
    step = num_processes // math.gcd(num_processes, num_generations)
    return math.ceil(num_questions / step) * step


def gathered(batch: Batch, accelerator: Accelerator, pad_id: int) -> Batch:
    """A batch's rows of all processes, in the order of the processes; numbers of the whole batch are left out."""
    rows = {name: x for name, x in batch.items() if not (isinstance(x, Tensor) and x.dim() == 0)}
    strange = [name for name, x in rows.items() if not isinstance(x, Tensor) or x.dim() > 2]
    if strange:
        raise ValueError(f"dynamic_sampling='refill' cannot exchange {', '.join(strange)}; use 'filter', or 'off'")
    return {
        name: accelerator.gather(
            accelerator.pad_across_processes(
                x, dim=1, pad_index=padding_of(name, pad_id), pad_first=name in PADDED_LEFT
            )
            if x.dim() == 2
            else x
        )
        for name, x in rows.items()
    }


def replaced(
    batch: Batch, extra: Batch, places: Sequence[int], sources: Sequence[int], num_generations: int, pad_id: int
) -> Batch:
    """`batch` with the groups `sources` of `extra` in `places`, all padded to the width of the wider."""
    result = {}
    for name, old in batch.items():
        new = extra[name]
        if old.dim() == 2:
            width = max(old.shape[1], new.shape[1])
            old, new = (widened(x, width, padding_of(name, pad_id), name in PADDED_LEFT) for x in (old, new))
        groups = old.reshape(-1, num_generations, *old.shape[1:]).clone()
        groups[list(places)] = new.reshape(-1, num_generations, *new.shape[1:])[list(sources)]
        result[name] = groups.reshape(old.shape)
    return result


def widened(x: Tensor, width: int, value: int, left: bool) -> Tensor:
    gap = width - x.shape[1]
    return torch.nn.functional.pad(x, (gap, 0) if left else (0, gap), value=value)


def padding_of(name: str, pad_id: int) -> int:
    """What TRL pads a tensor with."""
    return pad_id if name in ("prompt_ids", "completion_ids") else int(name == "tool_mask")
