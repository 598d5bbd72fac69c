"""The mixture's fields in requests to vLLM's OpenAI-compatible server.

Beside OpenAI's fields, `alpha`, `weights` or `member` set the request's own mixture, and `member_logprobs` returns the
log-probability of each generated token under each member. The server is vLLM's own, with one middleware: `vllm serve
CHECKPOINT --middleware logitmix.serving.http.MixtureFields`.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from uuid import uuid4

from prometheus_client import Histogram
from vllm import SamplingParams

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.serving.requests import MEMBER_PROMPTS, REQUEST_FIELDS, parse_request_weights

COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
PATHS = (*COMPLETIONS, "/v1/responses")
MEMBER_LOGPROBS = "member_logprobs"
SMALLEST_LOGPROB = -9999.0  # vLLM's: JSON has no infinity
ALPHA = Histogram(
    "logitmix_request_alpha",
    "Weight of the anchor in the mixture of each request.",
    buckets=[i / 10 for i in range(11)],
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class MixtureFields:
    """ASGI middleware that moves the mixture's fields to vLLM's sampling parameters, and adds `member_logprobs`.

    It returns status 400 for invalid fields, and for fields at paths other than `PATHS`, where vLLM would ignore them.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        config = scope["app"].state.engine_client.model_config.hf_config
        if not isinstance(config, LogitMixConfig):
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # of a proxy: --root-path
        body = await _read_body(receive)
        request = parse_object(body)
        unread = [] if request is None or path in PATHS else _given_fields(request)
        if unread:
            await _send_error(send, f"{path} does not read {unread[0]}; use one of {', '.join(PATHS)}")
            return
        if request is None or path not in PATHS:
            await self.app(scope, _replay_body(body, receive), send)
            return
        logprobs_mode = scope["app"].state.engine_client.model_config.logprobs_mode
        try:
            weights = move_mixture_fields(request, config)
            wants_member_logprobs = _take_member_logprobs(request, path, logprobs_mode)
        except ValueError as error:
            await _send_error(send, str(error))
            return
        if len(config.members) == 2:
            ALPHA.observe((weights or config.weights)[1])
        if wants_member_logprobs:
            await self._respond_with_member_logprobs(request, config.members, scope, receive, send)
        else:
            await self._call_app(request, scope, receive, send)

    async def _call_app(self, request: dict[str, Any], scope: Message, receive: Receive, send: Send) -> None:
        body = to_json(request)
        await self.app(_with_content_length(scope, body), _replay_body(body, receive), send)

    async def _respond_with_member_logprobs(
        self, request: dict[str, Any], members: list[str], scope: Message, receive: Receive, send: Send
    ) -> None:
        start: Message = {}
        chunks: list[bytes] = []

        async def collect(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                chunks.append(message.get("body", b""))

        await self._call_app(request | {"return_token_ids": True}, scope, receive, collect)
        body = b"".join(chunks)
        response = parse_object(body)  # None if the client has left
        if start["status"] == 200 and response is not None:
            try:
                await _add_member_logprobs(scope["app"].state.engine_client, request, response, members)
            except ValueError as error:  # the engine cannot score it
                await _send_error(send, f"member_logprobs: {error}")
                return
            body = to_json(response)
        await _send_response(send, start["status"], list(start["headers"]), body)


def _given_fields(request: dict[str, Any]) -> list[str]:
    return [name for name in (*REQUEST_FIELDS, MEMBER_LOGPROBS, MEMBER_PROMPTS) if request.get(name) is not None]


def _take_member_logprobs(request: dict[str, Any], path: str, logprobs_mode: str) -> bool:
    """Remove `member_logprobs` from the request, and return whether it is set.

    Raises `ValueError` where they cannot be returned.
    """
    if not _flag(MEMBER_LOGPROBS, request.pop(MEMBER_LOGPROBS, None)):
        return False
    returns_token_ids = _flag("return_token_ids", request.get("return_token_ids"))  # replaced before vLLM sees it
    if request.get("stream") or path not in COMPLETIONS:
        raise ValueError(
            f"member_logprobs is only supported for {' and '.join(COMPLETIONS)} without stream; leave it out, or set "
            "stream to false"
        )
    if request.get("echo") and path == "/v1/completions" and not returns_token_ids:
        raise ValueError(
            "echo is set beside member_logprobs, for which vLLM returns token ids and leaves the prompt out of the "
            "text; leave out echo, or set return_token_ids to true"
        )
    if logprobs_mode.endswith("logits"):
        raise ValueError(
            f"the server's --logprobs-mode is {logprobs_mode}, but member_logprobs needs log-probabilities; leave it "
            "out, or serve with raw_logprobs"
        )
    return True


def _flag(name: str, value: Any) -> bool:
    """The value of a field that is true, false or null. Raises `ValueError` for any other."""
    if value not in (None, True, False):
        raise ValueError(f"{name} is {value!r}, but must be true or false")
    return bool(value)


def move_mixture_fields(request: dict[str, Any], config: LogitMixConfig) -> list[float] | None:
    """Move the mixture's fields to `vllm_xargs`, which vLLM passes on as `extra_args`; return the weights.

    Raises `ValueError` for invalid fields, for those that `vllm_xargs` contradicts, and beside beam search.
    """
    given_fields = {key: request.pop(key, None) for key in REQUEST_FIELDS}
    # vLLM takes no null among its own arguments
    fields = {key: value for key, value in given_fields.items() if value is not None}
    given = request.get("vllm_xargs")
    if given is not None and not isinstance(given, dict):
        raise ValueError(f'vllm_xargs is {given!r}, but must be an object, such as {{"alpha": 0.3}}; or leave it out')
    for key in fields:
        other = (given or {}).get(key)
        if other is not None and other != fields[key]:
            raise ValueError(f"{key} is {fields[key]!r}, but {other!r} in vllm_xargs; set only one of them")
    extra_args = (given or {}) | fields
    if fields:
        request["vllm_xargs"] = extra_args
    weights = parse_request_weights(config, {MEMBER_PROMPTS: request.get(MEMBER_PROMPTS)} | extra_args)
    if weights is not None and request.get("use_beam_search"):
        raise ValueError(
            "use_beam_search is set, but vLLM's beam search would ignore the request's weights; leave out "
            f"{' and '.join(key for key in REQUEST_FIELDS if extra_args.get(key) is not None)}, or use_beam_search"
        )
    return weights


async def _add_member_logprobs(
    engine: Any, request: dict[str, Any], response: dict[str, Any], members: list[str]
) -> None:
    """Add `member_logprobs` to each choice of a response: for each member, one number per generated token.

    Raises `ValueError` for tokens that the server hides, and for those that the engine cannot score.
    """
    keep_ids = bool(request.get("return_token_ids"))
    salt = request.get("cache_salt")
    for choice in response["choices"]:
        if choice.get("token_ids") is None:  # hidden together with the reasoning
            raise ValueError("the server hides the tokens of this response; set include_reasoning to true")
        prompt = choice.get("prompt_token_ids") or response["prompt_token_ids"]  # a chat has one for all choices
        scores = await asyncio.gather(*[_score(engine, prompt, choice["token_ids"], name, salt) for name in members])
        choice["member_logprobs"] = dict(zip(members, scores, strict=True))
        if not keep_ids:
            choice.pop("prompt_token_ids", None)
            choice.pop("token_ids")
    if not keep_ids:
        response.pop("prompt_token_ids", None)


async def _score(
    engine: Any, prompt: list[int], completion: list[int], member: str, cache_salt: str | None = None
) -> list[float]:
    """Log-probability of each token of the completion under one member, at temperature 1.

    The completion is scored as part of a prompt, in the prefix cache of the request's `cache_salt`. vLLM has to
    generate one token after it; where that exceeds the context, it is the completion's last. Raises `ValueError` for a
    completion that fills the context, except under raw_logprobs.
    """
    ids, context = prompt + completion, engine.model_config.max_model_len
    last: dict[str, Any] = {}
    if len(ids) >= context:
        if engine.model_config.logprobs_mode != "raw_logprobs":  # that of the only allowed token would be 0
            raise ValueError(
                f"the completion fills the context of {context} tokens, which can be scored with --logprobs-mode "
                "raw_logprobs only; lower max_tokens"
            )
        ids, last = ids[:-1], {"allowed_token_ids": ids[-1:], "logprobs": 0}
    extra_args = {"member": member}
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, extra_args=extra_args, **last)
    scored = {"prompt_token_ids": ids} | ({} if cache_salt is None else {"cache_salt": cache_salt})
    async for output in engine.generate(scored, params, f"member-{uuid4().hex}"):
        final = output
    positions = [*final.prompt_logprobs[len(prompt) :], *(final.outputs[0].logprobs or [])]
    log_probs = [position[token].logprob for position, token in zip(positions, completion, strict=True)]
    return [max(log_prob, SMALLEST_LOGPROB) for log_prob in log_probs]


# --- ASGI messages --------------------------------------------------------------------------------------------------


async def _read_body(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay_body(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body first, then the client's later messages: a disconnect cancels the request."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_content_length(scope: Message, body: bytes) -> Message:
    return dict(scope) | {"headers": _set_content_length(scope["headers"], body)}


def _set_content_length(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> list[tuple[bytes, bytes]]:
    others = [(key, value) for key, value in headers if key.lower() != b"content-length"]
    return [*others, (b"content-length", str(len(body)).encode())]


def parse_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body, or None if it holds none."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def to_json(value: Any) -> bytes:
    return json.dumps(value).encode()  # in ASCII, since a text may hold half of a surrogate pair


async def _send_error(send: Send, message: str) -> None:
    error = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
    await _send_response(send, 400, [(b"content-type", b"application/json")], to_json(error))


async def _send_response(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": _set_content_length(headers, body)})
    await send({"type": "http.response.body", "body": body})
