"""Decoding a sweep: the members alone, then every mix at every alpha, on the same problems."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from logitmix.evaluation.decode import Decoder, Request, make_batches, make_requests
from logitmix.evaluation.responses import Responses
from logitmix.evaluation.sweep import MEMBERS
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
) -> None:
    """Add the responses of both members and of every mix at the alphas strictly between them."""
    members = make_batches(make_requests(dict(MEMBERS), num_problems), batch_size)
    responses.add("members alone", members, decoders.decode_pair)
    for mix in mixes:
        if mix != "merge":
            decoders.pair.config.scheme = mix  # type: ignore[assignment]
            requests = [Request(mix, alpha, i) for alpha in alphas for i in range(num_problems)]
            responses.add(f"mix {mix}", make_batches(requests, batch_size), decoders.decode_pair)
    if decoders.merged is not None and decoders.decode_merged is not None:
        policy, anchor = decoders.pair.members
        for alpha in alphas:
            set_merge(decoders.merged, policy, anchor, alpha)
            batches = make_batches(make_requests({"merge": alpha}, num_problems), batch_size)
            responses.add(f"merge at {alpha:g}", batches, replace(decoders.decode_merged, takes_alpha=False))
