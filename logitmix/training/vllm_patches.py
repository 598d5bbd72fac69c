"""Internals of vLLM that rollouts use.

Written against vLLM 0.32; tests/serving/test_vllm_patches.py is the contract.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def reload_weights_in_place(llm: Any, weights: Iterable[tuple[str, Tensor]], prefix: str = "") -> None:
    """Load weights into the model of an engine in this process, then reset its prefix cache.

    Requests that run read their tokens again, under the new weights: vLLM would keep the cache while they hold blocks.

    On a CPU vLLM repacks the weights of linear layers, after which `load_weights` cannot load single tensors. With a
    `prefix` such as `"policy."`, the weights are those of that submodule, and the others are left unchanged.

    vLLM's reload leaves the repacked copy of a head that is tied to the embeddings as it was, so it is repacked here.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.inplace import reload_weights

    engine = llm.llm_engine
    model = engine.model_executor.driver_worker.model_runner.model
    if prefix:  # vLLM reloads the whole module that it is given
        model = getattr(model, prefix.removesuffix("."))
        weights = ((name.removeprefix(prefix), weight) for name, weight in weights)
    reload_weights(engine.vllm_config, model, weights, weights_path=None, is_checkpoint_format=True)
    layers = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    embeddings = {id(layer.weight) for layer in layers if not isinstance(layer, ParallelLMHead)}
    for layer in layers:
        if isinstance(layer, ParallelLMHead) and id(layer.weight) in embeddings:
            layer.quant_method.process_weights_after_loading(layer)
    llm.reset_prefix_cache(reset_running_requests=True)
