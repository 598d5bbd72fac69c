"""One KV cache for all members: each member's view is its own range of layers."""

from collections.abc import Mapping, Sequence

from transformers.cache_utils import Cache

from logitmix.mixture.member_prompts import PassInputs


def member_caches(cache: Cache | None, num_layers: Sequence[int]) -> list[Cache | None]:
    """A view of the shared cache for each member, of `num_layers` layers, in the order of the weights.

    A view holds the same layer objects, so what a member writes is in the shared cache, and each member reads the
    sequence length from its own first layer, never from one that an earlier member has already extended.
    """
    if cache is None:
        return [None] * len(num_layers)
    # A cache built without a config adds layers on first use, but a view needs them to exist
    while cache.layer_class_to_replicate is not None and len(cache.layers) < sum(num_layers):
        cache.layers.append(cache.layer_class_to_replicate())
    views, start = [], 0
    for count in num_layers:
        view = Cache(layers=cache.layers[start : start + count])
        if cache.offloading:
            view.offloading, view.only_non_sliding = True, cache.only_non_sliding
            view.prefetch_stream = cache.prefetch_stream
        views.append(view)
        start += count
    return views


def validate_cached_tokens(caches: dict[str, Cache], inputs: Mapping[str, PassInputs]) -> None:
    """Raise `ValueError` if a member that is about to run has not cached every earlier token.

    `caches` are the views of the members that run, by name, and `inputs` what they are about to read. A member skipped
    at weight 0 has not read those tokens; mixing it in later would be silently wrong.
    """
    lengths = {name: int(cache.get_seq_length()) for name, cache in caches.items()}
    for name, length in lengths.items():
        expected, mask = max(lengths.values()), inputs[name].attention_mask
        if mask is not None and mask.dim() == 2:
            expected = mask.shape[1] - inputs[name].input_ids.shape[1]
        if length != expected:
            raise ValueError(
                f"the KV cache has {length} tokens of {name}, but {expected} precede this step: the member was "
                "skipped while its weight was 0; start a new cache when a weight changes from 0"
            )
