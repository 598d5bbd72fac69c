"""What `without_vllm.py` replaces in `transformers.cli.serving`, and the private names of it that it reads.

Written against transformers 5.19; tests/serving/test_transformers_patches.py is the contract.
"""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState


class SingleModelManager(ModelManager):
    """Serves one loaded model under one name, since transformers' manager loads models by their hub ids."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        super().__init__(force_model=name)

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.model, self.tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # transformers appends a revision of the hub, as in NAME@main

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "logitmix"}]


class SingleGenerationState(GenerationState):
    """Returns the same manager for every request, since transformers' state builds its own."""

    def __init__(self, manager: GenerateManager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, *_: Any, **__: Any) -> GenerateManager:
        return self._manager


def accepted_fields(handler: Any) -> frozenset[str]:
    """The fields of a request that a handler accepts, read or not; transformers has no public list of them."""
    return handler._valid_params_class.__mutable_keys__
