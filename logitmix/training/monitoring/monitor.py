"""What a training step did and cost, in TRL's log, and a stop at numbers that are not finite.

The trainer reports to a `Monitor`; the monitor never changes what is computed. docs/runs.md lists the metrics.

Shape legend: B sequences of a process, T completion tokens, K members, N completions of all processes, F rewards.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer

from logitmix.mixture.decoding.alternating import DecodingStatistics
from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.mixing import weights_to_alpha
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.batch import Batch, TokenScores, own_tokens, scored_inputs
from logitmix.training.monitoring import finite
from logitmix.training.monitoring.advice import AdviceCallback
from logitmix.training.monitoring.clock import Clock, OptimizerClock

TOKENS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
PHASES = ("rollouts", "rewards", "scoring", "update")


class Monitor:
    """Adds to TRL's log of each step: seconds by phase, tokens per second, the extremes of the ratio, and for a
    mixture alpha, the KL to each member and who wins where they disagree.

    Its methods raise `FloatingPointError` for a loss, reward, log-probability or gradient that is NaN or infinite,
    before the optimizer sees it, and save the batch under `output_dir/nonfinite-step-N`.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.trainer = trainer
        self.clock = Clock(trainer.accelerator.device)
        trainer.add_callback(OptimizerClock(self.clock))
        trainer.add_callback(AdviceCallback())
        self._tokens = {"rollouts": 0.0, "update": 0.0}  # of all processes, since the last log
        self._batches: list[Batch] = []  # of the update in progress
        self.last_tokens: Batch = {}  # tokens and masks of the micro-batch that the loss was last computed on
        self.decoding = DecodingStatistics()  # counts rollouts, in vLLM only if members take turns

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Add the seconds spent in the context to a phase, in training only."""
        return self.clock.timed(phase) if self.trainer.model.training else nullcontext()

    # --- rollouts -----------------------------------------------------------------------------------------------

    @contextmanager
    def rollouts(self, prompts: list) -> Iterator[None]:
        """Time the sampling of rollouts; stop the run where a logit is not finite."""
        self.decoding = DecodingStatistics()
        if self.trainer.use_vllm:
            self.trainer.vllm_generation.decoding = self.decoding
        with self.timed("rollouts"):
            try:
                yield
            except RuntimeError as error:
                if "probability tensor contains" not in str(error):  # torch.multinomial, on a CPU
                    raise
                name = finite.broken_parameter(self.trainer.model)
                what = "a logit was not finite while sampling" + (f" (the parameter {name} is not)" if name else "")
                finite.stop_run(self.trainer, what, {"prompts": prompts}, together=False)
        if self.trainer.model.training:
            self._log_decoding()

    def count_rollouts(
        self, completion_ids: list[list[int]], tool_mask: list[list[int]] | None, completions: list
    ) -> None:
        """Count the tokens of sampled completions, and correct TRL's metrics of truncation for stop strings.

        `tool_mask` has a 0 for each token that a tool wrote; these are not counted.
        """
        trainer = self.trainer
        if trainer.stop_strings:
            lengths = [len(ids) for ids in completion_ids] if tool_mask is None else [sum(mask) for mask in tool_mask]
            self._correct_truncation(completion_ids, lengths, [_text(completion) for completion in completions])
        if trainer.model.training:
            mean_length = trainer.step_metrics["completions/mean_length"][-1]
            self._tokens["rollouts"] += mean_length * len(completion_ids) * trainer.accelerator.num_processes

    def _log_decoding(self) -> None:
        """Log the passes a token of rollouts, and the acceptance rate of drafts, over all processes."""
        counted = self.decoding
        counts = [counted.tokens, sum(counted.passes), sum(counted.drafted), sum(counted.accepted)]
        local = torch.tensor([counts], device=self.trainer.accelerator.device)
        tokens, passes, drafted, accepted = self.trainer.accelerator.gather(local).sum(0).tolist()
        if tokens:
            self.trainer.step_metrics["decoding/passes_per_token"].append(passes / tokens)
        if drafted:
            self.trainer.step_metrics["decoding/acceptance"].append(accepted / drafted)

    def _correct_truncation(self, completion_ids: list[list[int]], lengths: list[int], texts: list[str]) -> None:
        """Log TRL's metrics of completion lengths again: TRL counts a completion without EOS as truncated."""
        trainer = self.trainer
        device = trainer.accelerator.device
        ended = [
            ids[-1] in trainer.eos_token_ids or any(stop in text for stop in trainer.stop_strings)
            for ids, text in zip(completion_ids, texts, strict=True)
        ]
        lengths_N = trainer.accelerator.gather(torch.tensor(lengths, device=device)).float()
        ended_N = trainer.accelerator.gather(torch.tensor(ended, device=device))
        terminated_N = lengths_N[ended_N] if ended_N.any() else torch.zeros(1, device=device)
        metrics = trainer.mode_metrics
        metrics["completions/clipped_ratio"][-1] = 1 - ended_N.float().mean().item()
        metrics["completions/mean_terminated_length"][-1] = terminated_N.mean().item()
        metrics["completions/min_terminated_length"][-1] = terminated_N.min().item()
        metrics["completions/max_terminated_length"][-1] = terminated_N.max().item()

    def require_finite_rewards(self, rewards_NF: Tensor, prompts: Sequence[Any], completions: Sequence[Any]) -> None:
        """Stop the run at a reward that is not finite. Rewards are of all processes, the texts of this one."""
        if self.trainer.model.training:
            finite.require_finite_rewards(self.trainer, rewards_NF, prompts, completions)

    # --- the loss -----------------------------------------------------------------------------------------------

    def observe_loss(self, batch: Batch, scores: TokenScores, loss: Tensor) -> None:
        """Log what a micro-batch's loss was computed from, as means over the tokens of all processes.

        Stops the run where a number is not finite. Does nothing outside training.
        """
        if not self.trainer.model.training:
            return
        self._batches.append(batch)
        self.last_tokens = {key: batch[key] for key in TOKENS if key in batch}
        mask_BT = own_tokens(batch).bool()
        log_probs_BT = scores.log_probs.detach()
        old_BT = batch.get("old_per_token_logps", log_probs_BT)
        log_ratio_BT = log_probs_BT - old_BT
        infinity = torch.full_like(log_ratio_BT, torch.inf)
        broken = {
            "the log-probability under the old policy": finite.count_broken(old_BT, mask_BT),
            "the log-probability": finite.count_broken(log_probs_BT, mask_BT),
            "the loss": finite.count_broken(loss),
        }
        sums = {"tokens": mask_BT.sum()} | mixture_sums(scores.diagnostics, mask_BT, self._member_names())
        extremes = [
            torch.where(mask_BT, log_ratio_BT, infinity).amin().exp(),
            torch.where(mask_BT, log_ratio_BT, -infinity).amax().exp(),
        ]
        local = torch.stack([x.float() for x in (*broken.values(), *sums.values(), *extremes)])
        gathered = self.trainer.accelerator.gather(local[None])
        numbers = [*gathered[:, :-2].sum(0).tolist(), gathered[:, -2].min().item(), gathered[:, -1].max().item()]

        faults = [name for name, count in zip(broken, numbers, strict=False) if count]
        if faults:
            what = f"{faults[0]} is not finite{self._members_not_finite(batch)}"
            finite.stop_at_batches(self.trainer, what, self._batches)
        self._log_sums(dict(zip(sums, numbers[len(broken) : -2], strict=True)), *numbers[-2:])

    def _log_sums(self, sums: dict[str, float], ratio_min: float, ratio_max: float) -> None:
        metrics, nan = self.trainer.step_metrics, float("nan")  # TRL leaves NaN out of its means
        tokens, disagree = sums.pop("tokens"), sums.get("mixture/disagreement", 0.0)
        self._tokens["update"] += tokens
        if tokens:
            metrics["ratio/min"].append(ratio_min)
            metrics["ratio/max"].append(ratio_max)
        for name, value in sums.items():
            count = disagree if name.endswith("_wins") else tokens
            metrics[name].append(value / count if count else nan)
        model = self.trainer.model
        if isinstance(model, LogitMixForCausalLM) and weights_to_alpha(model.config.weights) is not None:
            metrics["alpha"].append(model.alpha)

    def _member_names(self) -> list[str]:
        if not isinstance(self.trainer.model, LogitMixForCausalLM):
            return []
        return self.trainer.model.config.display_names

    def _members_not_finite(self, batch: Batch) -> str:
        """Which members' logits are not finite on a batch, found by scoring each member alone."""
        model, accelerator = self.trainer.model, self.trainer.accelerator
        if not isinstance(model, LogitMixForCausalLM):
            return ""
        ids, mask, labels = scored_inputs(batch)
        names, counts = self._member_names(), []
        for k in range(len(names)):
            alone = [float(i == k) for i in range(len(names))]
            with torch.no_grad(), accelerator.autocast():
                scores = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, weights=alone)
            counts.append(finite.count_broken(scores.log_probs))
        totals = accelerator.gather(torch.stack(counts)[None]).sum(0).tolist()
        broken = [name for name, count in zip(names, totals, strict=True) if count]
        return f" (nor are the logits of the {' and the '.join(broken)})" if broken else ""

    def finite_grad_norm(self, norm: Any) -> Any:
        """The gradient's norm, whole where it is sharded; stops the run where it is not finite."""
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        accelerator = self.trainer.accelerator
        if norm is not None and accelerator.scaler is None:  # fp16's scaler skips such steps itself
            broken = finite.count_broken(torch.as_tensor(norm, device=accelerator.device).detach())
            if accelerator.gather(broken[None]).any():
                finite.stop_at_batches(self.trainer, f"the gradient's norm is {float(norm)}", self._batches)
        self._batches.clear()
        return norm

    # --- the log ------------------------------------------------------------------------------------------------

    def complete_metrics(self) -> None:
        """Turn what was observed since the last log into metrics, just before TRL logs them."""
        metrics = self.trainer.step_metrics
        for name, extreme in (("ratio/min", min), ("ratio/max", max)):
            if metrics.get(name):
                metrics[name] = [extreme(metrics[name])]
        if not (self.trainer.model.training and self.clock.steps):
            return
        seconds, steps = self.clock.seconds, self.clock.steps
        seconds["update"] = seconds["step"] - seconds["inputs"] + seconds["optimizer"]
        for phase in PHASES:
            metrics[f"time/{phase}"] = [seconds[phase] / steps]
        if "validation" in seconds:
            metrics["time/validation"] = [seconds["validation"] / steps]
        for phase, tokens in self._tokens.items():
            if tokens:
                metrics[f"tokens_per_second/{phase}"] = [tokens / seconds[phase]]
            self._tokens[phase] = 0.0
        self.clock.reset()


def mixture_sums(diagnostics: MixtureDiagnostics | None, mask_BT: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Sums of the diagnostics over the tokens in the mask, by the names their means are logged under."""
    if diagnostics is None:
        return {}
    kl_BTK, *flags = (x[:, -mask_BT.shape[1] :] for x in diagnostics)
    sums = {f"mixture/kl_{name}": kl_BTK[..., k][mask_BT].sum() for k, name in enumerate(names)}
    flag_names = ("mixture/disagreement", "mixture/policy_wins", "mixture/anchor_wins")
    return sums | {name: flag[mask_BT].sum() for name, flag in zip(flag_names, flags, strict=True)}


def _text(completion: Any) -> str:
    """The text that ends a completion; of messages, the last one if the policy wrote it and not a tool."""
    if isinstance(completion, str):
        return completion
    return completion[-1].get("content") or "" if completion[-1]["role"] == "assistant" else ""
