"""What the server without vLLM replaces in `transformers.cli.serving`, and the private names of it that it reads.

Written against transformers 5.19; tests/serving/test_transformers_patches.py is the contract.
"""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState


class SingleModelManager(ModelManager):
    """Serves one model that is loaded already, under one name; transformers' loads models by their hub ids."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        super().__init__(force_model=name)

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.model, self.tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # not NAME@main: it is no revision of the hub

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "logitmix"}]


class SingleGenerationState(GenerationState):
    """Gives every request the same manager; transformers' chooses one by the model."""

    def __init__(self, manager: GenerateManager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, *_: Any, **__: Any) -> GenerateManager:
        return self._manager


def request_fields(handler: Any) -> frozenset[str]:
    """The fields of a request that a handler of transformers accepts, whether or not it reads them."""
    return handler._valid_params_class.__mutable_keys__
