"""Wall seconds of the phases of a training step."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback


class Clock:
    """Adds up the seconds of phases, each measured until the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.seconds[phase] += self.now() - start

    def reset(self) -> None:
        self.seconds.clear()
        self.steps = 0


class OptimizerClock(TrainerCallback):
    """Counts updates and adds their seconds to the phase `optimizer` of a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.start = 0.0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.start = self.clock.now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.clock.seconds["optimizer"] += self.clock.now() - self.start
        self.clock.steps += 1
