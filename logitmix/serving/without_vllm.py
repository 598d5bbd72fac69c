"""An OpenAI-compatible server of a mixture without vLLM: transformers' own, one request at a time.

Beside OpenAI's fields, `alpha`, `weights` or `member` set the request's own mixture, as in vLLM. Fields that
transformers would silently ignore (`n`, `logprobs`, …) are rejected.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import uvicorn
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerateManager

from logitmix.mixture.context import context_length, longest_prompt, validate_fits_context
from logitmix.mixture.decoding.loop import Decoding, validate_decoding
from logitmix.mixture.generation import get_eos_token_ids
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.tokenizers import leave_texts_open, validate_renders_texts
from logitmix.serving.requests import MEMBER_PROMPTS, REQUEST_FIELDS, parse_request_weights
from logitmix.serving.transformers_patches import SingleGenerationState, SingleModelManager, accepted_fields

# fields of all three APIs that have an effect
SUPPORTED = {"model", "stream", "temperature", "top_p", "seed", "generation_config"}
# fields that transformers ignores without harm
HARMLESS = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "stream_options", "user",
}  # fmt: skip
# values without effect; transformers' penalty is multiplicative and OpenAI's additive, so only 0 is accepted
NEUTRAL = {
    "n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "echo": False, "member_logprobs": False,
}  # fmt: skip

# fields of vLLM's server alone, which transformers would reject by its own status 422
ONLY_VLLM = {"member_logprobs", "vllm_xargs"}

# of the request being handled
_weights: ContextVar[list[float]] = ContextVar("weights")
_seed: ContextVar[int | None] = ContextVar("seed")


def serve(
    model: LogitMixForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    host: str,
    port: int,
    decoding: Decoding = "auto",
) -> None:
    """Serve the model as `name` at `host:port` until interrupted. `config.alpha_range` limits requests."""
    uvicorn.run(build_app(model, tokenizer, name, decoding), host=host, port=port)


def build_app(
    model: LogitMixForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, decoding: Decoding = "auto"
) -> Any:
    """transformers' ASGI application, which serves the model as `name`, decoding as `generate(decoding=…)`.

    Raises `ValueError` for a decoding that the mixture does not have.
    """
    validate_decoding(model, decoding)
    leave_texts_open(tokenizer)
    # OpenAI's API samples by default, from all tokens; of the checkpoint's generation_config only the end tokens count
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, eos_token_id=get_eos_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    models = SingleModelManager(model, tokenizer, name)
    state = SingleGenerationState(MixtureGenerateManager(decoding))
    app = build_server(
        models,
        MixtureChatHandler(models, state),
        completion_handler=MixtureCompletionHandler(models, state),
        response_handler=MixtureResponseHandler(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        generation_state=state,
    )
    # transformers raises all of them for bad requests, and chat templates for messages that they do not take
    for error in (HTTPException, KeyError, TypeError, ValueError, TemplateError):
        app.add_exception_handler(error, _error_response)
    return app


async def _error_response(_: Any, error: Any) -> JSONResponse:
    """An error in the format that OpenAI's clients expect."""
    text, code = (error.detail, error.status_code) if isinstance(error, HTTPException) else (str(error), 400)
    if isinstance(error, KeyError):
        text = f"the request has no {error}"
    return JSONResponse({"error": {"message": text, "type": "BadRequestError", "param": None, "code": code}}, code)


class RequestFieldsMixin:
    """Removes the mixture's fields from a request before transformers reads it."""

    model_manager: SingleModelManager
    supported_fields: frozenset[str]  # beside SUPPORTED

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Handle a request. Raises `ValueError` for invalid fields, and for those that transformers would ignore."""
        config = self.model_manager.model.config
        fields = {key: body.pop(key, None) for key in (*REQUEST_FIELDS, MEMBER_PROMPTS)}
        _weights.set(parse_request_weights(config, fields) or config.weights)
        self._validate_fields(body)
        for field in ONLY_VLLM:
            body.pop(field, None)
        _seed.set(_take_seed(body))
        body.setdefault("stream", False)  # transformers streams responses by default
        return await super().handle_request(body, request_id)  # type: ignore[misc]

    def _validate_fields(self, body: dict[str, Any]) -> None:
        known = accepted_fields(self) | ONLY_VLLM  # transformers rejects any other
        for field in sorted(body.keys() & known - SUPPORTED - self.supported_fields - HARMLESS):
            if body[field] is not None and body[field] != NEUTRAL.get(field):
                raise ValueError(f"{field} is not supported without vLLM: leave it out, or pip install vllm")


class MixtureChatHandler(RequestFieldsMixin, ChatCompletionHandler):
    supported_fields = frozenset({"messages", "tools", "chat_template_kwargs", "max_tokens", "stop", "logit_bias"})

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        validate_renders_texts(self.model_manager.tokenizer)
        limit = body.pop("max_completion_tokens", None)  # the newer name, which transformers ignores
        return await super().handle_request(body if limit is None else body | {"max_tokens": limit}, request_id)


class MixtureCompletionHandler(RequestFieldsMixin, CompletionHandler):
    supported_fields = frozenset({"prompt", "suffix", "max_tokens", "stop"})


class MixtureResponseHandler(RequestFieldsMixin, ResponseHandler):
    supported_fields = frozenset({"input", "instructions", "tools", "max_output_tokens"})

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        validate_renders_texts(self.model_manager.tokenizer)
        return await super().handle_request(body, request_id)


class MixtureGenerateManager(GenerateManager):
    """`model.generate` with the request's weights and seed, limited to the members' context."""

    def __init__(self, decoding: Decoding) -> None:
        super().__init__()
        self._decoding = decoding

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, *args: Any, **kw: Any) -> Any:
        inputs = _prepare_generation(model, inputs, config) | {"decoding": self._decoding}
        return super().generate_streaming(model, processor, inputs, config, *args, **kw)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, **kw: Any) -> Any:
        inputs = _prepare_generation(model, inputs, config) | {"decoding": self._decoding}
        return await super().generate_non_streaming(model, processor, inputs, config, **kw)

    def submit(self, fn: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return super().submit(_seeded(fn), *args, **kw)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return super().async_submit(_seeded(fn), *args, **kw)


def _prepare_generation(model: LogitMixForCausalLM, inputs: Any, config: GenerationConfig) -> dict[str, Any]:
    """Add the request's weights to the inputs of `generate`, and limit its completion to the members' context.

    Raises `ValueError` for an empty prompt, and for one that leaves no room for a completion.
    """
    length, context = inputs["input_ids"].shape[-1], context_length(model.config)
    if length == 0:
        raise ValueError("the prompt is empty")
    if context is not None:
        length, name = longest_prompt(model.config, length)
        validate_fits_context(context, length, max_new_tokens=1, prompt=name)
        room = context - length
        config.max_new_tokens = room if config.max_new_tokens is None else min(config.max_new_tokens, room)
    return {**inputs, "weights": _weights.get()}


def _take_seed(body: dict[str, Any]) -> int | None:
    """Remove `seed` from a request: transformers would set it while another request generates.

    Raises `ValueError` for a seed that is no integer of 64 bits.
    """
    seed = body.pop("seed", None)
    if seed is not None and (type(seed) is not int or abs(seed) >= 1 << 63):
        raise ValueError(f"seed is {seed!r}, but must be an integer of 64 bits")
    return seed


def _seeded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, run after setting the request's seed."""
    seed = _seed.get()

    def run(*args: Any, **kw: Any) -> Any:
        if seed is not None:
            torch.manual_seed(seed)
        return fn(*args, **kw)

    return run
