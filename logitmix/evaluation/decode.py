"""Decodes and grades responses to a task's problems, greedy or sampled, at any alpha."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.evaluation.requests import Request, Response, make_batches, make_requests, one_hot_weights
from logitmix.mixture.context import context_length, longest_prompt, validate_fits_context
from logitmix.mixture.decoding.loop import Decoding, validate_decoding
from logitmix.mixture.generation import GREEDY, generate_completions, get_eos_token_ids, tokenize_prompts
from logitmix.mixture.mixing import weights_to_alpha
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.tokenizers import prepare_for_task
from logitmix.tasks import Problem, Task

MAX_NEW_TOKENS = 512  # the limit in the authors' code
BATCH_SIZE = 256


def get_alphas(model: PreTrainedModel) -> dict[str, float | None]:
    """The names and alphas to evaluate: policy, anchor and mixture, or the model itself if it is not a mixture.

    Where no alpha gives the weights of a mixture, they are None: `weights_to_evaluate`.
    """
    weights = weights_to_evaluate(model)
    if weights is not None:
        return dict.fromkeys(weights)
    if isinstance(model, LogitMixForCausalLM):
        return {"policy": 0.0, "anchor": 1.0, "mixture": model.alpha}
    return {"model": None}


def weights_to_evaluate(model: PreTrainedModel) -> dict[str, list[float]] | None:
    """The names and weights to evaluate of a mixture that has no alpha: each member, and the mixture.

    These have more than two members, or weights that do not sum to 1. None for other models (`get_alphas`).
    """
    if not isinstance(model, LogitMixForCausalLM) or weights_to_alpha(model.config.weights) is not None:
        return None
    return one_hot_weights(model.config.display_names) | {"mixture": list(model.config.weights)}


Decode = Callable[[Sequence[Sequence[Request]]], Iterator[list[Response]]]
OnResponse = Callable[[int, Response], None]  # the index in its batch, and the response


@dataclass(frozen=True)
class Decoder:
    """Decodes and grades batches of requests, one batch after another: a `Decode`; see `make_decoder`.

    `prompts` are texts, for the responses, and `prompt_ids` their tokens. `ends` are the tokens that end a response.
    Without `takes_alpha`, the alpha of a request only labels its response; `weights` are those of the mixture for
    requests of each name that have no alpha.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    problems: Sequence[Problem]
    prompts: Sequence[str]
    prompt_ids: Sequence[list[int]]
    ends: Sequence[int]
    settings: Mapping[str, Any]
    seed: int
    decoding: Decoding
    takes_alpha: bool = True
    weights: Mapping[str, Sequence[float]] | None = None

    def __call__(
        self, batches: Sequence[Sequence[Request]], on_response: OnResponse | None = None
    ) -> Iterator[list[Response]]:
        """The responses of each batch. `on_response` gets each as soon as its sequence has ended."""
        for batch in batches:
            yield self._decode(batch, on_response)

    def _decode(self, batch: Sequence[Request], on_response: OnResponse | None) -> list[Response]:
        responses: dict[int, Response] = {}

        def ended(i: int, ids: list[int]) -> None:
            responses[i] = self.respond(batch[i], ids)
            assert on_response is not None
            on_response(i, responses[i])

        completions = self.complete(batch, None if on_response is None else ended)
        return [responses.get(i) or self.respond(batch[i], ids) for i, ids in enumerate(completions)]

    def complete(
        self, batch: Sequence[Request], on_completion: Callable[[int, list[int]], None] | None = None
    ) -> list[list[int]]:
        """The tokens of the response to each request, with the one that ended it."""
        was_training = self.model.training
        self.model.eval()
        with _seeded(f"{self.seed}/{batch[0]}") if self.settings["do_sample"] else nullcontext():
            completions = generate_completions(
                self.model,
                self.tokenizer,
                [self.prompt_ids[request.problem] for request in batch],
                dict(self.settings),
                self.task.template.stop,
                self.decoding,
                on_completion=on_completion,
                **self._mixing(batch),
            )
        self.model.train(was_training)
        return completions

    def _mixing(self, batch: Sequence[Request]) -> dict[str, Any]:
        """The argument `alpha` or `weights` of the forward, for the batch or for each sequence."""
        if self.weights is None or all(request.alpha is not None for request in batch):
            return _alphas(batch) if self.takes_alpha else {}
        own: Sequence[float] = self.model.config.weights
        weights = [list(self.weights.get(request.name, own)) for request in batch]
        return {"weights": weights[0] if all(each == weights[0] for each in weights) else weights}

    def respond(self, request: Request, ids: list[int]) -> Response:
        problem = self.problems[request.problem]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        grade = self.task.grade(text, problem)
        ended = ids[-1] in self.ends or any(stop in text for stop in self.task.template.stop)
        return Response(
            **asdict(request), prompt=self.prompts[request.problem], response=text, gold=problem.answer,
            format_ok=grade.format_ok, answer_ok=grade.answer_ok, lenient_ok=grade.lenient_ok,
            length=len(ids), truncated=not ended,
        )  # fmt: skip


def make_decoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    decoding: Decoding = "auto",
    weights: Mapping[str, Sequence[float]] | None = None,
) -> Decoder:
    """Return a function that decodes and grades batches of requests, one batch after another.

    Each sequence has its own alpha. Temperature 0 is greedy; above 0, the samples of a batch depend only on the seed
    and the batch. `max_new_tokens` defaults to 512, or to what the longest prompt leaves of the context. `decoding` is
    that of `LogitMixForCausalLM.generate`. `weights` are those of a mixture for requests without an alpha, by name; by
    default `weights_to_evaluate`.

    Raises `ValueError`, before anything is decoded, for a prompt that exceeds the context, for a tokenizer that does
    not keep the task's format (`prepare_for_task`), and for a decoding that the model does not have.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, but must be 0 (greedy) or above")
    validate_decoding(model, decoding)
    prepare_for_task(tokenizer, task, problems)
    prompts = [task.prompt(problem) for problem in problems]
    prompt_ids = tokenize_prompts(tokenizer, prompts, task.chat_template_kwargs)
    texts = [p if isinstance(p, str) else tokenizer.decode(ids) for p, ids in zip(prompts, prompt_ids, strict=True)]
    settings = generation_settings(temperature) | {
        "max_new_tokens": _resolve_max_new_tokens(model, prompt_ids, max_new_tokens)
    }
    ends = get_eos_token_ids(model, tokenizer)
    return Decoder(
        model, tokenizer, task, problems, texts, prompt_ids, ends, settings, seed, decoding,
        weights=weights_to_evaluate(model) if weights is None else weights,
    )  # fmt: skip


def greedy_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    alphas: Mapping[str, float | None],
    max_new_tokens: int | None = None,
    batch_size: int = BATCH_SIZE,
    on_response: OnResponse | None = None,
    decoding: Decoding = "auto",
) -> list[Response]:
    """Each named alpha's greedy response to each problem; see `make_decoder`.

    `on_response` gets each response as soon as its sequence has ended, with its index in its batch.
    """
    batches = make_batches(make_requests(alphas, len(problems)), batch_size)
    decode = make_decoder(model, tokenizer, task, problems, max_new_tokens, decoding=decoding)
    return [response for batch in decode(batches, on_response) for response in batch]


def generation_settings(temperature: float) -> dict[str, Any]:
    """Settings for `generate`: greedy at temperature 0, otherwise sampling from the whole distribution."""
    # top_k=0: transformers samples from the 50 most probable tokens by default
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else dict(GREEDY)


def _alphas(batch: Sequence[Request]) -> dict[str, Any]:
    """The `alpha` argument of the forward: one value or one per sequence; none for a model that is not a mixture."""
    alphas = [request.alpha for request in batch]
    if None in alphas:
        return {}
    return {"alpha": alphas[0] if len(set(alphas)) == 1 else alphas}


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Seed torch's generators by a name within the context, and restore them afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest()))
        yield


def _resolve_max_new_tokens(model: PreTrainedModel, prompt_ids: list[list[int]], max_new_tokens: int | None) -> int:
    """`max_new_tokens`, or the default cut to what the longest prompt leaves of the context."""
    context = context_length(model.config)
    longest = max(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    length, name = longest_prompt(model.config, len(prompt_ids[longest]), f"prompt {longest}")
    if max_new_tokens is None:
        max_new_tokens = MAX_NEW_TOKENS if context is None else max(1, min(MAX_NEW_TOKENS, context - length))
    validate_fits_context(context, length, max_new_tokens, prompt=name)
    return max_new_tokens
