"""The classes that vLLM loads by name in its worker processes."""

from dataclasses import asdict
from typing import Any

from vllm.config import VllmConfig

from logitmix.serving.alternating.vllm_patches import platform_worker, speculate_by_members, take_turns


class AlternatingWorker(platform_worker()):  # type: ignore[misc]
    """vLLM's worker, with a model runner whose members take turns."""

    def init_device(self) -> None:
        if self.use_v2_model_runner:
            speculate_by_members()
        super().init_device()
        take_turns(self.model_runner, self.use_v2_model_runner)

    def decoding_statistics(self) -> dict[str, Any]:
        """The fields of `DecodingStatistics`."""
        return asdict(self.model_runner.turns.statistics())

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        self.model_runner.turns.forget()
        super().reload_weights(*args, **kwargs)


class NoProposer:
    """Fills vLLM's place for a class that drafts. It drafts nothing: the members draft for each other."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        pass

    def load_model(self, target_model: Any) -> None:
        """vLLM calls this on a CPU."""

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise RuntimeError("alternating decoding needs its own model runner; pass all of alternating_decoding()")
