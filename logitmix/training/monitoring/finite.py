"""Stops a run at numbers that are not finite, before an update, and saves the batch for inspection.

Shape legend: N completions of all processes, F reward functions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer

from logitmix.mixture.quantization import plain_tensors

WAY_OUT = "Inspect the batch, then resume from the last checkpoint with another setting, such as a lower learning_rate"


def broken_parameter(model: nn.Module) -> str | None:
    """The name of a parameter with a value that is not finite, or None. Synchronises with the device once.

    Of a sharded parameter, only this process's part is checked, so that one process can call it alone. Parameters of
    8 bits are skipped.
    """
    local = [(name, p.to_local() if isinstance(p, DTensor) else p) for name, p in model.named_parameters()]
    plain = [(name, tensor.detach()) for name, parameter in local for tensor in plain_tensors(parameter)]
    named = [(name, p) for name, p in plain if p.numel() and p.is_floating_point() and p.element_size() > 1]
    if not named:  # partitioned by ZeRO-3
        return None
    finite = [torch.isfinite(parameter).all() for _, parameter in named]
    together = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    return next((name for (name, _), ok in zip(named, together, strict=True) if not ok), None)


def require_finite_parameters(model: nn.Module) -> None:
    """Raise `ValueError` where a parameter holds NaN or infinite values before the first step."""
    name = broken_parameter(model)
    if name is not None:
        raise ValueError(f"the parameter {name} holds values that are not finite; load another checkpoint")


def broken_reward(rewards_NF: Tensor, weights_F: Tensor, names: Sequence[str]) -> tuple[int, str] | None:
    """The first completion whose reward is not finite, with the function and its value, or None.

    TRL turns a function's None into NaN and leaves it out of the sum, which is fine as long as another function
    returns a number. An infinite reward, or a completion without any reward, is not.
    """
    weighted_NF = rewards_NF * weights_F.to(rewards_NF)
    broken_N = weighted_NF.isinf().any(1) | weighted_NF.isnan().all(1)
    if not broken_N.any():
        return None
    row = int(broken_N.nonzero()[0])
    infinite_F = weighted_NF[row].isinf()
    if infinite_F.any():
        f = int(infinite_F.nonzero()[0])
        return row, f"the reward function {names[f]!r} gave {rewards_NF[row, f].item()}"
    return row, f"the reward function {' and '.join(map(repr, names))} gave None or NaN"


def count_broken(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """The number of values in the mask that are NaN or infinite, as a tensor on the device."""
    broken = ~torch.isfinite(values)
    return (broken if mask is None else broken & mask).sum()


def stop_run(trainer: GRPOTrainer, what: str, content: dict[str, Any], together: bool = True) -> None:
    """Save `content` under `output_dir/nonfinite-step-N`, one file per process, and raise `FloatingPointError`.

    All processes call it, or one alone with `together=False`. The step's update has not been made.
    """
    accelerator = trainer.accelerator
    step = trainer.state.global_step + 1
    folder = Path(trainer.args.output_dir) / f"nonfinite-step-{step}"
    saved = f"The batch is in {folder} (torch.load)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"what": what, "step": step} | content, folder / f"rank-{accelerator.process_index}.pt")
    except OSError as error:
        saved = f"The batch could not be saved in {folder} ({error})"
    if together:
        accelerator.wait_for_everyone()  # a launcher kills the others as soon as one process fails
    raise FloatingPointError(
        f"step {step} stopped, with the weights as they were before it: {what}. {saved}. {WAY_OUT}"
    )


def stop_at_batches(trainer: GRPOTrainer, what: str, batches: Sequence[dict[str, Any]]) -> None:
    """`stop_run` with the batches of the loss, and their texts."""

    def texts(ids_BT: Tensor, mask_BT: Tensor) -> list[str]:
        return trainer.text_tokenizer.batch_decode(
            [ids[mask.bool()] for ids, mask in zip(ids_BT, mask_BT, strict=True)]
        )

    saved = []
    for batch in batches:
        tensors = {key: value.cpu() for key, value in batch.items() if isinstance(value, Tensor)}
        prompts = texts(batch["prompt_ids"], batch["prompt_mask"])
        completions = texts(batch["completion_ids"], batch["completion_mask"])
        saved.append(tensors | {"prompts": prompts, "completions": completions})
    stop_run(trainer, what, {"batches": saved})


def require_finite_rewards(
    trainer: GRPOTrainer, rewards_NF: Tensor, prompts: Sequence[Any], completions: Sequence[Any]
) -> None:
    """Stop the run at a reward that is not finite. `rewards_NF` are of all processes, the texts of this one."""
    broken = broken_reward(rewards_NF, trainer.reward_weights, trainer.reward_func_names)
    if broken is None:
        return
    row, fault = broken
    what = f"{fault} for completion {row}, {_shortened(gather_object(list(completions))[row])}"
    content = {"prompts": list(prompts), "completions": list(completions), "rewards": rewards_NF.cpu()}
    stop_run(trainer, what, content)


def _shortened(text: Any, length: int = 60) -> str:
    text = text if isinstance(text, str) else text[-1]["content"]
    return repr(text if len(text) <= length else text[:length] + "…")
