"""Decoding a sweep: the members alone, then every mix at every alpha, on the same problems."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from transformers import PreTrainedModel

from logitmix.evaluation.decode import Decoder
from logitmix.evaluation.requests import Request, make_batches, make_requests
from logitmix.evaluation.responses import Responses
from logitmix.evaluation.sweep import MEMBERS, Round, best_alphas
from logitmix.mixture.merging import set_merge
from logitmix.mixture.modeling import LogitMixForCausalLM


@dataclass(frozen=True)
class Decoders:
    """The models of a sweep and their decoders; `merged` takes the weights of the merge at one alpha after another."""

    pair: LogitMixForCausalLM
    decode_pair: Decoder
    merged: PreTrainedModel | None
    decode_merged: Decoder | None


def decode_sweep(
    responses: Responses,
    decoders: Decoders,
    num_problems: int,
    mixes: Sequence[str],
    alphas: Sequence[float],
    batch_size: int,
    rounds: Sequence[Round],
) -> None:
    """Add the responses of both members, and of every mix at the alphas strictly between them, round by round."""
    members = make_batches(make_requests(dict(MEMBERS), num_problems), batch_size)
    responses.add("members alone", members, decoders.decode_pair)
    for mix in mixes:
        left = list(alphas)
        for part in rounds if alphas else ():
            left = best_alphas(responses.rows, mix, left, part.num_alphas) if part.start else left
            requests = [[Request(mix, alpha, i) for i in range(part.start, part.stop)] for alpha in left]
            if mix == "merge":
                _decode_merges(responses, decoders, requests, batch_size)
            else:
                decoders.pair.config.scheme = mix  # type: ignore[assignment]
                batches = make_batches(list(chain.from_iterable(requests)), batch_size)
                responses.add(f"mix {mix}", batches, decoders.decode_pair)


def _decode_merges(
    responses: Responses, decoders: Decoders, requests: Sequence[Sequence[Request]], batch_size: int
) -> None:
    """Decode the requests of one alpha after another, each from the weights merged at it."""
    assert decoders.merged is not None
    assert decoders.decode_merged is not None
    for of_alpha in requests:
        alpha = of_alpha[0].alpha
        assert alpha is not None
        policy, anchor = decoders.pair.members
        set_merge(decoders.merged, policy, anchor, alpha)
        batches = make_batches(of_alpha, batch_size)
        responses.add(f"merge at {alpha:g}", batches, replace(decoders.decode_merged, takes_alpha=False))
