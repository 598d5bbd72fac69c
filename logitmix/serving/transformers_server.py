"""The OpenAI API of a mixture without vLLM: transformers' own server, one request at a time.

Beside OpenAI's fields, `alpha`, `weights` or `member` set the request's own mixture, as in vLLM. Fields that
transformers would silently ignore (`n`, `logprobs`, …) are refused.
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
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerateManager

from logitmix.mixture.context import context_length, validate_fits_context
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.serving.request_weights import REQUEST_FIELDS, parse_request_weights
from logitmix.serving.transformers_patches import SingleGenerationState, SingleModelManager, request_fields

ANSWERED = {"model", "stream", "temperature", "top_p", "seed", "generation_config"}
# fields that transformers ignores without harm
HARMLESS = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "stream_options", "user",
}  # fmt: skip
# values without effect. transformers' penalty is multiplicative and OpenAI's additive, so only 0 is accepted
NEUTRAL = {
    "n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0, "echo": False, "member_logprobs": False,
}  # fmt: skip

# of the request being handled
_weights: ContextVar[list[float]] = ContextVar("weights")
_seed: ContextVar[int | None] = ContextVar("seed")


def serve(model: LogitMixForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, host: str, port: int) -> None:
    """Serve the model as `name` at `host:port` until interrupted. `config.alpha_range` limits requests."""
    uvicorn.run(build_app(model, tokenizer, name), host=host, port=port)


def build_app(model: LogitMixForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    # OpenAI's API samples by default, and from all tokens
    model.generation_config.update(do_sample=True, top_k=model.generation_config.top_k or 0)
    models = SingleModelManager(model, tokenizer, name)
    state = SingleGenerationState(MixtureGenerateManager())
    app = build_server(
        models,
        _Chat(models, state),
        completion_handler=_Completions(models, state),
        response_handler=_Responses(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        generation_state=state,
    )
    for error in (HTTPException, KeyError, TypeError, ValueError):  # also raised by transformers
        app.add_exception_handler(error, _error_response)
    return app


async def _error_response(_: Any, error: Any) -> JSONResponse:
    """An error in the format that OpenAI's clients expect."""
    text, code = (error.detail, error.status_code) if isinstance(error, HTTPException) else (str(error), 400)
    if isinstance(error, KeyError):
        text = f"the request has no {error}"
    return JSONResponse({"error": {"message": text, "type": "BadRequestError", "param": None, "code": code}}, code)


class MixtureGenerateManager(GenerateManager):
    """`model.generate` with the request's weights and seed, limited to the members' context."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, *args: Any, **kw: Any) -> Any:
        _limit_to_context(model, inputs, config)
        inputs = {**inputs, "weights": _weights.get()}
        return super().generate_streaming(model, processor, inputs, config, *args, **kw)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, config: Any, **kw: Any) -> Any:
        _limit_to_context(model, inputs, config)
        inputs = {**inputs, "weights": _weights.get()}
        return await super().generate_non_streaming(model, processor, inputs, config, **kw)

    def submit(self, fn: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return super().submit(_seeded(fn), *args, **kw)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        return super().async_submit(_seeded(fn), *args, **kw)


def _seeded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` after seeding; transformers would seed earlier, while another request generates."""
    seed = _seed.get()

    def run(*args: Any, **kw: Any) -> Any:
        if seed is not None:
            torch.manual_seed(seed)
        return fn(*args, **kw)

    return run


def _limit_to_context(model: LogitMixForCausalLM, inputs: Any, config: GenerationConfig) -> None:
    length, context = inputs["input_ids"].shape[-1], context_length(model.config)
    if length == 0:
        raise ValueError("the prompt is empty")
    if context is None:
        return
    validate_fits_context(context, length, max_new_tokens=1)
    room = context - length
    config.max_new_tokens = room if config.max_new_tokens is None else min(config.max_new_tokens, room)


class _Fields:
    """Removes the mixture's fields from a request before transformers reads it."""

    model_manager: SingleModelManager
    _answered: frozenset[str]  # beside ANSWERED

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Handle a request. Raises `ValueError` for wrong fields, and for those that transformers would ignore."""
        config = self.model_manager.model.config
        _weights.set(parse_request_weights(config, {key: body.pop(key, None) for key in REQUEST_FIELDS}) or config.weights)
        known = request_fields(self) | {"member_logprobs"}  # transformers refuses any other
        for field in sorted(body.keys() & known - ANSWERED - self._answered - HARMLESS):
            if body[field] is not None and body[field] != NEUTRAL.get(field):
                raise ValueError(f"{field} is not supported without vLLM: leave it out, or pip install vllm")
        body.pop("member_logprobs", None)
        seed = body.pop("seed", None)
        if seed is not None and (type(seed) is not int or abs(seed) >= 1 << 63):
            raise ValueError(f"seed is {seed!r}, but must be an integer of 64 bits")
        _seed.set(seed)
        body.setdefault("stream", False)  # transformers' default for responses is to stream
        return await super().handle_request(body, request_id)  # type: ignore[misc]


class _Chat(_Fields, ChatCompletionHandler):
    _answered = frozenset({"messages", "tools", "chat_template_kwargs", "max_tokens", "stop", "logit_bias"})

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        limit = body.pop("max_completion_tokens", None)  # the newer name, which transformers ignores
        return await super().handle_request(body if limit is None else body | {"max_tokens": limit}, request_id)


class _Completions(_Fields, CompletionHandler):
    _answered = frozenset({"prompt", "suffix", "max_tokens", "stop"})


class _Responses(_Fields, ResponseHandler):
    _answered = frozenset({"input", "instructions", "tools", "max_output_tokens"})
