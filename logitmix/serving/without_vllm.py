"""The OpenAI API of a mixture where there is no vLLM: transformers' own server, one request at a time.

`alpha`, `weights` or `member` beside the fields that OpenAI knows choose the request's own mixture, as in vLLM. What
transformers would ignore without a word (`n`, `logprobs`, …) is refused.
"""

from contextvars import ContextVar
from typing import Any

import uvicorn
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState

from logitmix.modeling import LogitMixForCausalLM
from logitmix.serving.requests import KEYS, request_weights

# fields that transformers ignores, and that may be ignored
HARMLESS = {"metadata", "parallel_tool_calls", "safety_identifier", "service_tier", "store", "stream_options", "user"}
NEUTRAL = {"n": 1, "best_of": 1, "presence_penalty": 0, "echo": False, "member_logprobs": False}

_weights: ContextVar[list[float]] = ContextVar("weights")  # of the request that is handled


def serve(model: LogitMixForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, host: str, port: int) -> None:
    """Answer at `host:port` for the model `name`, until interrupted. `config.alpha_range` limits what requests ask."""
    uvicorn.run(build_app(model, tokenizer, name), host=host, port=port)


def build_app(model: LogitMixForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    # OpenAI's API samples where it is not told otherwise, and from all tokens
    model.generation_config.update(do_sample=True, top_k=model.generation_config.top_k or 0)
    models, state = _OneModel(model, tokenizer, name), _Generation()
    app = build_server(
        models,
        _Chat(models, state),
        completion_handler=_Completions(models, state),
        response_handler=_Responses(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        generation_state=state,
    )
    for error in (HTTPException, ValueError):  # the latter are `generate`'s, of a stop string for instance
        app.add_exception_handler(error, _answer)
    return app


async def _answer(_: Any, error: Any) -> JSONResponse:
    """As OpenAI's clients expect an error."""
    text, code = (error.detail, error.status_code) if isinstance(error, HTTPException) else (str(error), 400)
    return JSONResponse({"error": {"message": text, "type": "BadRequestError", "param": None, "code": code}}, code)


class _OneModel(ModelManager):
    def __init__(self, model: LogitMixForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        super().__init__(force_model=name)

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[LogitMixForCausalLM, PreTrainedTokenizerBase]:
        return self.model, self.tokenizer

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "logitmix"}]


class _Generation(GenerationState):
    def __init__(self) -> None:
        super().__init__()
        self._manager = _Generate()

    def get_manager(self, *_: Any, **__: Any) -> "_Generate":
        return self._manager


class _Generate(GenerateManager):
    """`model.generate` with the weights of the request, within the members' context."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, *args: Any, **kw: Any) -> Any:
        _keep_within_context(model, inputs, config)
        inputs = {**inputs, "weights": _weights.get()}
        return super().generate_streaming(model, processor, inputs, config, *args, **kw)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, **kw: Any) -> Any:
        _keep_within_context(model, inputs, config)
        inputs = {**inputs, "weights": _weights.get()}
        return await super().generate_non_streaming(model, processor, inputs, config, **kw)


def _keep_within_context(model: LogitMixForCausalLM, inputs: Any, config: GenerationConfig) -> None:
    length, context = inputs["input_ids"].shape[-1], model.config.max_position_embeddings
    if context is None:
        return
    if length >= context:
        raise HTTPException(400, f"the prompt has {length} tokens, but the members' context is {context}")
    config.max_new_tokens = min(config.max_new_tokens, context - length)


class _Fields:
    """Takes the mixture's fields out of a request, before transformers looks at it."""

    model_manager: _OneModel
    _unused_fields: set[str]

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        config = self.model_manager.model.config
        try:
            _weights.set(request_weights(config, {key: body.pop(key, None) for key in KEYS}) or config.weights)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        for field in (self._unused_fields - HARMLESS | {"member_logprobs"}) & body.keys():
            if body[field] is not None and body[field] != NEUTRAL.get(field):
                raise HTTPException(400, f"{field} is not answered without vLLM: leave it out, or pip install vllm")
        body.pop("member_logprobs", None)
        body.setdefault("stream", False)  # transformers streams responses where it is not told otherwise
        return await super().handle_request(body, request_id)  # type: ignore[misc]


class _Chat(_Fields, ChatCompletionHandler):
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        limit = body.pop("max_completion_tokens", None)  # the newer name, which transformers would ignore
        return await super().handle_request(body if limit is None else body | {"max_tokens": limit}, request_id)


class _Completions(_Fields, CompletionHandler):
    pass


class _Responses(_Fields, ResponseHandler):
    pass
