"""The OpenAI API of a mixture where there is no vLLM: transformers' own server, one request at a time.

`alpha`, `weights` or `member` beside the fields that OpenAI knows choose the request's own mixture, as in vLLM. What
transformers would ignore without a word (`n`, `logprobs`, …) is refused.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
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

from logitmix.mixture.context import context_length, validate_fits_context
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.serving.requests import KEYS, request_weights

ANSWERED = {"model", "stream", "temperature", "top_p", "seed", "generation_config"}
# what transformers ignores, and may be ignored
HARMLESS = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "stream_options", "user",
}  # fmt: skip
# transformers has a penalty by factors for OpenAI's by differences, so no other is answered than none
NEUTRAL = {
    "n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "echo": False, "member_logprobs": False,
}  # fmt: skip

# of the request that is handled
_weights: ContextVar[list[float]] = ContextVar("weights")
_seed: ContextVar[int | None] = ContextVar("seed")


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
    for error in (HTTPException, KeyError, TypeError, ValueError):  # transformers', of a stop string for instance
        app.add_exception_handler(error, _answer)
    return app


async def _answer(_: Any, error: Any) -> JSONResponse:
    """As OpenAI's clients expect an error."""
    text, code = (error.detail, error.status_code) if isinstance(error, HTTPException) else (str(error), 400)
    if isinstance(error, KeyError):
        text = f"the request has no {error}"
    return JSONResponse({"error": {"message": text, "type": "BadRequestError", "param": None, "code": code}}, code)


class _OneModel(ModelManager):
    def __init__(self, model: LogitMixForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        super().__init__(force_model=name)

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[LogitMixForCausalLM, PreTrainedTokenizerBase]:
        return self.model, self.tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # not NAME@main: it is no revision of the hub

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "logitmix"}]


class _Generation(GenerationState):
    def __init__(self) -> None:
        super().__init__()
        self._manager = _Generate()

    def get_manager(self, *_: Any, **__: Any) -> "_Generate":
        return self._manager


class _Generate(GenerateManager):
    """`model.generate` with the weights and the seed of the request, within the members' context."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, *args: Any, **kw: Any) -> Any:
        _keep_within_context(model, inputs, config)
        inputs = {**inputs, "weights": _weights.get()}
        return super().generate_streaming(model, processor, inputs, config, *args, **kw)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, **kw: Any) -> Any:
        _keep_within_context(model, inputs, config)
        inputs = {**inputs, "weights": _weights.get()}
        return await super().generate_non_streaming(model, processor, inputs, config, **kw)

    def submit(self, fn: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return super().submit(_seeded(fn), *args, **kw)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return super().async_submit(_seeded(fn), *args, **kw)


def _seeded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` from the request's seed on, which transformers would set while another request generates."""
    seed = _seed.get()

    def run(*args: Any, **kw: Any) -> Any:
        if seed is not None:
            torch.manual_seed(seed)
        return fn(*args, **kw)

    return run


def _keep_within_context(model: LogitMixForCausalLM, inputs: Any, config: GenerationConfig) -> None:
    length, context = inputs["input_ids"].shape[-1], context_length(model.config)
    if length == 0:
        raise ValueError("the prompt is empty")
    if context is None:
        return
    validate_fits_context(context, length, max_new_tokens=1)
    room = context - length
    config.max_new_tokens = room if config.max_new_tokens is None else min(config.max_new_tokens, room)


class _Fields:
    """Takes the mixture's fields out of a request, before transformers looks at it."""

    model_manager: _OneModel
    _valid_params_class: Any
    _answered: frozenset[str]  # beside ANSWERED

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Raises `ValueError` for fields that are wrong, or that transformers would ignore."""
        config = self.model_manager.model.config
        _weights.set(request_weights(config, {key: body.pop(key, None) for key in KEYS}) or config.weights)
        known = self._valid_params_class.__mutable_keys__ | {"member_logprobs"}  # others transformers refuses
        for field in sorted(body.keys() & known - ANSWERED - self._answered - HARMLESS):
            if body[field] is not None and body[field] != NEUTRAL.get(field):
                raise ValueError(f"{field} is not answered without vLLM: leave it out, or pip install vllm")
        body.pop("member_logprobs", None)
        seed = body.pop("seed", None)
        if seed is not None and (type(seed) is not int or abs(seed) >= 1 << 63):
            raise ValueError(f"seed is {seed!r}, but must be an integer of 64 bits")
        _seed.set(seed)
        body.setdefault("stream", False)  # transformers streams responses where it is not told otherwise
        return await super().handle_request(body, request_id)  # type: ignore[misc]


class _Chat(_Fields, ChatCompletionHandler):
    _answered = frozenset({"messages", "tools", "chat_template_kwargs", "max_tokens", "stop", "logit_bias"})

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        limit = body.pop("max_completion_tokens", None)  # the newer name, which transformers would ignore
        return await super().handle_request(body if limit is None else body | {"max_tokens": limit}, request_id)


class _Completions(_Fields, CompletionHandler):
    _answered = frozenset({"prompt", "suffix", "max_tokens", "stop"})


class _Responses(_Fields, ResponseHandler):
    _answered = frozenset({"input", "instructions", "tools", "max_output_tokens"})
