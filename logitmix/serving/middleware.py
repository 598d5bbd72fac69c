"""The fields of a mixture in the requests of vLLM's OpenAI-compatible server.

Beside OpenAI's fields, `alpha`, `weights` or `member` set the request's own mixture, and `member_logprobs` returns the
log-probability of each generated token under each member. This is a middleware of vLLM's own server: `vllm serve
CHECKPOINT --middleware logitmix.serving.middleware.MixtureFields`.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from uuid import uuid4

from prometheus_client import Histogram
from vllm import SamplingParams

from logitmix.serving.request_weights import REQUEST_FIELDS, parse_request_weights
from logitmix.serving.batch_weights import BatchWeights

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
ALPHA = Histogram(
    "logitmix_request_alpha",
    "Weight of the anchor in the mixture of each request.",
    buckets=[i / 10 for i in range(11)],
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class MixtureFields:
    """ASGI middleware: moves the mixture's fields to vLLM's sampling parameters, and adds `member_logprobs`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        served = BatchWeights.served
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS or served is None:
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        try:
            request = json.loads(body)
        except ValueError:
            request = None
        if not isinstance(request, dict):  # vLLM reports the error
            await self.app(scope, _replay(body, receive), send)
            return
        fields = {key: request.pop(key) for key in REQUEST_FIELDS if key in request}
        wants_members = bool(request.pop("member_logprobs", False))
        xargs = request.get("vllm_xargs") or {}
        try:
            weights = parse_request_weights(served, xargs | fields)
            if wants_members and (request.get("stream") or scope["path"] == PATHS[2]):
                raise ValueError("member_logprobs is available for completions and chat completions without stream")
        except ValueError as error:
            await _refuse(send, str(error))
            return
        if fields:
            request["vllm_xargs"] = xargs | fields
        if len(served.members) == 2:
            ALPHA.observe((weights or served.weights)[1])
        if not wants_members:
            await self.app(_with_length(scope, body := _dump(request)), _replay(body, receive), send)
            return
        asked_ids = bool(request.get("return_token_ids"))
        body = _dump(request | {"return_token_ids": True})
        status, headers, answer = await self._collect(_with_length(scope, body), _replay(body, receive))
        if status == 200:
            answer = await _add_member_logprobs(scope["app"].state.engine_client, answer, served.members, asked_ids)
        await _respond(send, status, headers, answer)

    async def _collect(self, scope: Message, receive: Receive) -> tuple[int, list, bytes]:
        """The whole response of the wrapped server."""
        start: Message = {}
        chunks: list[bytes] = []

        async def collect(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                chunks.append(message.get("body", b""))

        await self.app(scope, receive, collect)
        return start["status"], list(start["headers"]), b"".join(chunks)


async def _add_member_logprobs(engine: Any, answer: bytes, members: list[str], keep_ids: bool) -> bytes:
    """Add `member_logprobs` to each choice: for each member, one number per generated token."""
    response = json.loads(answer)
    chat_prompt = response.get("prompt_token_ids")
    for choice in response["choices"]:
        prompt = choice.get("prompt_token_ids") or chat_prompt
        scores = await asyncio.gather(*[_score(engine, prompt, choice["token_ids"], name) for name in members])
        choice["member_logprobs"] = dict(zip(members, scores, strict=True))
        if not keep_ids:
            choice.pop("prompt_token_ids", None)
            choice.pop("token_ids")
    if not keep_ids:
        response.pop("prompt_token_ids", None)
    return _dump(response)


async def _score(engine: Any, prompt: list[int], completion: list[int], member: str) -> list[float]:
    """Log-probability of each token of the completion under one member, at temperature 1.

    The completion is scored as part of a prompt, whose last position vLLM samples from instead of scoring; hence one
    more token.
    """
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, extra_args={"member": member})
    async for output in engine.generate({"prompt_token_ids": prompt + completion}, params, f"member-{uuid4().hex}"):
        final = output
    positions = final.prompt_logprobs[len(prompt) :]
    return [position[token].logprob for position, token in zip(positions, completion, strict=True)]


async def _read(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Yield the body once, then what the client sends: a disconnect cancels the request."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_length(scope: Message, body: bytes) -> Message:
    headers = [(key, value) for key, value in scope["headers"] if key.lower() != b"content-length"]
    return dict(scope) | {"headers": [*headers, (b"content-length", str(len(body)).encode())]}


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


async def _refuse(send: Send, message: str) -> None:
    error = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
    await _respond(send, 400, [(b"content-type", b"application/json")], _dump(error))


async def _respond(send: Send, status: int, headers: list, body: bytes) -> None:
    headers = [(key, value) for key, value in headers if key.lower() != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
