"""Warnings about runs that do not learn, from what the trainer logs; each at most once a start."""

import warnings
from collections import deque
from math import sqrt
from statistics import fmean, variance
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SPREAD_STEPS = 10
FORMAT_STEPS, LOW_FORMAT = 3, 0.05
WINDOW, WINDOW_STEPS = 12, 20  # logs, and steps that they must cover, for the comparison of reward and KL
LEAST_GROWTH = 0.05  # nats a token


class Advice:
    """Reads one log after another: `groups/without_spread`, `format_rate`, `reward`, and the KL to the anchor.

    What concerns rollouts is logged by the update that samples them; a log without it changes nothing.

    - most groups without spread for 10 steps: the gradient comes from few questions;
    - a format rate near 0 in the first steps: no rollout can earn a reward;
    - a reward that does not change while the KL to the anchor doubles, over at least 20 steps.
    """

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._step = 0
        self._without_spread_since: int | None = None
        self._low_format = True
        self._window: deque[tuple[int, float, float]] = deque(maxlen=WINDOW)

    def observe(self, step: int, logs: dict[str, Any], first_step: int = 0) -> list[str]:
        """The new warnings after the log of a step; `first_step` is the step that the run started or resumed from."""
        before, self._step = max(self._step, first_step), step
        found = {
            "spread": self._groups(before, step, logs),
            "format": self._format(step, logs) if first_step == 0 else None,
            "reward": self._reward(step, logs),
        }
        new = {name: text for name, text in found.items() if text is not None and name not in self._given}
        self._given |= new.keys()
        return list(new.values())

    def _groups(self, before: int, step: int, logs: dict[str, Any]) -> str | None:
        share = logs.get("groups/without_spread")
        if share is None:
            return None
        if not share > 0.5:
            self._without_spread_since = None
            return None
        if self._without_spread_since is None:
            self._without_spread_since = before
        if step - self._without_spread_since < SPREAD_STEPS:
            return None
        reward = logs.get("reward", float("nan"))
        return (
            f"more than half of the groups had no spread of rewards for {step - self._without_spread_since} steps, "
            f"{100 * share:.0f} % in the last: all rollouts of such a question earn the same (mean reward "
            f"{reward:.2f}), so it has no advantage; try questions that are sometimes answered right, a larger "
            "num_generations, or dynamic_sampling='refill'"
        )

    def _format(self, step: int, logs: dict[str, Any]) -> str | None:
        rate = logs.get("format_rate")
        if rate is None:
            return None
        self._low_format = self._low_format and rate < LOW_FORMAT
        if not self._low_format or step < FORMAT_STEPS:
            return None
        of_mixture = "a larger alpha, scheme='prob', " if "alpha" in logs else ""
        return (
            f"{100 * rate:.1f} % of the rollouts are in the required format after {step} steps, and no other can earn "
            f"a reward; try {of_mixture}another template (logitmix check-task --model_name_or_path), or more SFT"
        )

    def _reward(self, step: int, logs: dict[str, Any]) -> str | None:
        to_anchors = [value for key, value in logs.items() if key.startswith("mixture/kl_anchor")]
        reward, kl = logs.get("reward"), fmean(to_anchors) if to_anchors else logs.get("kl")
        if reward is None or kl is None or not (reward == reward and kl == kl):
            return None
        self._window.append((step, reward, kl))
        if len(self._window) < WINDOW or step - self._window[0][0] < WINDOW_STEPS:
            return None
        half = WINDOW // 2
        early, late = list(self._window)[:half], list(self._window)[half:]
        (r_early, r_late), (k_early, k_late) = (([row[i] for row in early], [row[i] for row in late]) for i in (1, 2))
        moved = fmean(r_late) - fmean(r_early)
        noise = 2 * sqrt((variance(r_early) + variance(r_late)) / half)
        grown = fmean(k_late) > 2 * fmean(k_early) and fmean(k_late) - fmean(k_early) > LEAST_GROWTH
        if moved > noise or not grown or logs.get("answer_rate", 0.0) > 0.95:
            return None
        return (
            f"the reward has not risen since step {self._window[0][0]} ({fmean(r_early):.2f}, then "
            f"{fmean(r_late):.2f}), while the KL to the reference grew from {fmean(k_early):.2g} to "
            f"{fmean(k_late):.2g} nats a token: the policy moves without learning; try a smaller learning_rate, a "
            "larger alpha or beta, or read the completions"
        )


class AdviceCallback(TrainerCallback):
    """Gives the `Advice` of a training as warnings, in the first process."""

    def __init__(self) -> None:
        self.advice, self.first_step = Advice(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.advice, self.first_step = Advice(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            for text in self.advice.observe(state.global_step, logs, self.first_step):
                warnings.warn(text, stacklevel=2)
