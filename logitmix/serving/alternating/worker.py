"""The classes that vLLM loads by name in its worker processes."""

from typing import Any

from vllm.config import VllmConfig

from logitmix.serving.alternating.vllm_patches import platform_worker, take_turns


class AlternatingWorker(platform_worker()):  # type: ignore[misc]
    """vLLM's worker, with a model runner whose members take turns."""

    def init_device(self) -> None:
        super().init_device()
        take_turns(self.model_runner)

    def decoding_statistics(self) -> dict[str, Any]:
        """The fields of `DecodingStatistics`."""
        return self.model_runner.turns.counts()

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        self.model_runner.turns.forget()
        super().reload_weights(*args, **kwargs)


class NoProposer:
    """vLLM's place for a drafting class, which the members do not need: they draft for each other."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        pass

    def load_model(self, target_model: Any) -> None:
        """vLLM calls this on a CPU."""

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise RuntimeError("alternating decoding needs its own model runner; pass all of alternating_decoding()")
