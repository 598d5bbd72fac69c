"""TRL's GRPO trainer under watch: it logs what each step did and cost, and stops at numbers that are not finite.

Shape legend: B sequences of a process, T completion tokens, K members, N completions of all processes, F rewards.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer

from logitmix.mixture.diagnostics import MixtureDiagnostics
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.monitoring import finite
from logitmix.training.monitoring.clock import Clock, OptimizerClock


class WatchedGRPOTrainer(GRPOTrainer):
    """Adds to TRL's log, each step: seconds by phase, tokens per second, the ratio's extremes, and for a mixture
    alpha, the KLs to its members and who wins where they disagree (docs/runs.md has the list).

    Raises `FloatingPointError` before the optimizer sees a loss, reward, log-probability or gradient that is NaN or
    infinite; the batch is saved under `output_dir/nonfinite-step-N`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        finite.require_finite_parameters(self.model)
        self.clock = Clock(self.accelerator.device)
        self.add_callback(OptimizerClock(self.clock))
        self.diagnostics: MixtureDiagnostics | None = None  # of the loss under way; the mixture's forward leaves it
        self._tokens = {"rollouts": 0.0, "update": 0.0}  # since the last log, of all processes
        self._batches: list[dict[str, Any]] = []  # what the next optimizer step is made of

    # --- seconds ----------------------------------------------------------------------------------------------

    def _timed(self, phase: str) -> AbstractContextManager[None]:
        return self.clock.timed(phase) if self.model.training else nullcontext()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.clock.timed("step"):
            return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with self._timed("inputs"):
            return super()._prepare_inputs(*args, **kwargs)

    def _generate(self, prompts: list) -> tuple:
        with self._timed("rollouts"):
            try:
                output = super()._generate(prompts)
            except RuntimeError as error:
                if "probability tensor contains" not in str(error):  # torch.multinomial, on a CPU
                    raise
                where = finite.broken_parameter(self.model)
                what = "a logit was not finite while sampling" + (f" (the parameter {where} is not)" if where else "")
                finite.stop_run(self, what, {"prompts": prompts}, together=False)
        if self.model.training:
            mean_length = self._metrics["train"]["completions/mean_length"][-1]
            self._tokens["rollouts"] += mean_length * len(prompts) * self.accelerator.num_processes
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train"]
        for name, extreme in (("ratio/min", min), ("ratio/max", max)):
            if metrics.get(name):
                metrics[name] = [extreme(metrics[name])]
        if self.model.training and self.clock.steps:
            seconds, steps = self.clock.seconds, self.clock.steps
            seconds["update"] = seconds["step"] - seconds["inputs"] + seconds["optimizer"]
            for phase in ("rollouts", "rewards", "scoring", "update"):
                metrics[f"time/{phase}"] = [seconds[phase] / steps]
            if "validation" in seconds:
                metrics["time/validation"] = [seconds["validation"] / steps]
            for phase, tokens in self._tokens.items():
                if tokens:
                    metrics[f"tokens_per_second/{phase}"] = [tokens / seconds[phase]]
                self._tokens[phase] = 0.0
            self.clock.reset()
        super().log(logs, start_time)

    # --- the loss ---------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        if not torch.is_grad_enabled():
            with self._timed("scoring"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs_BT = scores[0].detach()
        return scores

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.diagnostics = None
        loss: Tensor = super()._compute_loss(model, inputs)
        if self.model.training:
            self._batches.append(inputs)
            self._watch(inputs, loss.detach())
        return loss

    def _watch(self, inputs: dict[str, Any], loss: Tensor) -> None:
        """Log what the loss was made of, as means over the tokens of all processes; stop if it is not finite."""
        mask_BT = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        log_probs_BT = self._log_probs_BT
        old_BT = inputs.get("old_per_token_logps", log_probs_BT)
        log_ratio_BT = log_probs_BT - old_BT
        infinity = torch.full_like(log_ratio_BT, torch.inf)
        broken = {
            "the log-probability under the old policy": finite.count_broken(old_BT, mask_BT),
            "the log-probability": finite.count_broken(log_probs_BT, mask_BT),
            "the loss": finite.count_broken(loss),
        }
        sums = {"tokens": mask_BT.sum()} | mixture_sums(self.diagnostics, mask_BT, self._member_names())
        extremes = [
            torch.where(mask_BT, log_ratio_BT, infinity).amin().exp(),
            torch.where(mask_BT, log_ratio_BT, -infinity).amax().exp(),
        ]
        local = torch.stack([x.float() for x in (*broken.values(), *sums.values(), *extremes)])
        gathered = self.accelerator.gather(local[None])
        numbers = [*gathered[:, :-2].sum(0).tolist(), gathered[:, -2].min().item(), gathered[:, -1].max().item()]

        faults = [name for name, count in zip(broken, numbers, strict=False) if count]
        if faults:
            finite.stop_at_batches(self, f"{faults[0]} is not finite{self._culprits(inputs)}", self._batches)
        self._log_sums(dict(zip(sums, numbers[len(broken) : -2], strict=True)), *numbers[-2:])

    def _log_sums(self, sums: dict[str, float], ratio_min: float, ratio_max: float) -> None:
        metrics, nan = self._metrics["train"], float("nan")  # TRL leaves NaN out of its means
        tokens, disagree = sums.pop("tokens"), sums.get("mixture/disagreement", 0.0)
        self._tokens["update"] += tokens
        if tokens:
            metrics["ratio/min"].append(ratio_min)
            metrics["ratio/max"].append(ratio_max)
        for name, value in sums.items():
            count = disagree if name.endswith("_wins") else tokens
            metrics[name].append(value / count if count else nan)
        if isinstance(self.model, LogitMixForCausalLM) and len(self.model.config.weights) == 2:
            metrics["alpha"].append(self.model.alpha)

    def _member_names(self) -> list[str]:
        if not isinstance(self.model, LogitMixForCausalLM):
            return []
        names = list(self.model.config.members)
        return ["policy", "anchor"] if len(names) == 2 else names

    def _culprits(self, inputs: dict[str, Any]) -> str:
        """Which members' logits are not finite on this batch: each is scored alone."""
        if not isinstance(self.model, LogitMixForCausalLM):
            return ""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : inputs["prompt_ids"].shape[1]] = -100
        names, counts = self._member_names(), []
        for k in range(len(names)):
            alone = [float(i == k) for i in range(len(names))]
            with torch.no_grad(), self.accelerator.autocast():
                scores = self.model(
                    input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, weights=alone
                )
            counts.append(finite.count_broken(scores.log_probs))
        totals = self.accelerator.gather(torch.stack(counts)[None]).sum(0).tolist()
        guilty = [name for name, count in zip(names, totals, strict=True) if count]
        return f" (nor are the logits of the {' and the '.join(guilty)})" if guilty else ""

    # --- rewards and gradients --------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        with self._timed("rewards"):
            rewards_NF: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            finite.require_finite_rewards(self, rewards_NF, prompts, completions)
        self._rewards_NF = rewards_NF
        return rewards_NF

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        start = self.accelerator.process_index * len(inputs)
        output["rewards"] = self._rewards_NF[start : start + len(inputs)]  # for the batch that a guard saves
        return output

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if norm is not None and self.accelerator.scaler is None:  # fp16's scaler skips such steps itself
            broken = finite.count_broken(torch.as_tensor(norm, device=self.accelerator.device).detach())
            if self.accelerator.gather(broken[None]).any():
                finite.stop_at_batches(self, f"the gradient's norm is {float(norm)}", self._batches)
        self._batches.clear()
        return norm


def mixture_sums(found: MixtureDiagnostics | None, mask_BT: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Sums over the tokens in the mask, by the names under which their means are logged; none without diagnostics."""
    if found is None:
        return {}
    kl_BTK, *flags = (x[:, -mask_BT.shape[1] :] for x in found)
    sums = {f"mixture/kl_{name}": kl_BTK[..., k][mask_BT].sum() for k, name in enumerate(names)}
    names_of_flags = ("mixture/disagreement", "mixture/policy_wins", "mixture/anchor_wins")
    return sums | {name: flag[mask_BT].sum() for name, flag in zip(names_of_flags, flags, strict=True)}
