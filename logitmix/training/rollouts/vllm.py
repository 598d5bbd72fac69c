"""Rollouts of a mixture in vLLM, through TRL.

vLLM holds the mixture as one model (see `logitmix.serving`). A sync pushes only the weights that train, since the rest
is frozen. alpha is never pushed: every request carries the weights in force. Two full members may take turns
(`logitmix.serving.alternating`).
"""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.decoding.alternating import DecodingStatistics
from logitmix.mixture.frozen.by_reference import save_by_reference
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.serving.alternating import alternating_decoding, decoding_statistics
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.rollouts.trl_patches import PatchedVLLMGeneration, generation_class
from logitmix.training.vllm_patches import reload_weights_in_place

POLICY_PREFIX = "policy."


class MixtureVLLMGeneration(PatchedVLLMGeneration):
    """TRL's `VLLMGeneration` for a mixture, whose two members take turns if it `alternates`.

    Then `generate` adds the passes and drafts to `decoding`.
    """

    model: LogitMixForCausalLM
    generation_kwargs: dict[str, Any]
    decoding: DecodingStatistics
    _push_all_weights = False

    def __init__(self, *args: Any, alternates: bool = False, **kwargs: Any) -> None:
        self.alternates, self.decoding = alternates, DecodingStatistics()  # before TRL builds the engine
        super().__init__(*args, **kwargs)

    def engine_arguments(self) -> dict[str, Any]:
        return alternating_decoding() if self.alternates else {}

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's trained weights, or all weights after vLLM slept at level 2."""
        if self._push_all_weights:
            yield from super().named_weights()
            return
        mixture = self.model
        trained = {name for name, parameter in mixture.policy.named_parameters() if parameter.requires_grad}
        self.model = mixture.policy
        try:
            for name, parameter in super().named_weights():
                if name in trained:
                    yield POLICY_PREFIX + name, parameter
        finally:
            self.model = mixture

    def sync_weights(self) -> None:
        """Push `named_weights` into vLLM, and reset its prefix cache."""
        self._push_all_weights = self.weights_are_discarded
        is_adapter = "policy" in self.model.config.adapters
        if self.mode == "colocate" and self.accelerator.device.type == "cpu" and not is_adapter:
            prefix = "" if self._push_all_weights else POLICY_PREFIX
            reload_weights_in_place(self.llm, self.detached_weights(), prefix)
        else:
            super().sync_weights()

    def generate(self, *args: Any, **kwargs: Any) -> tuple:
        """As TRL's, from the mixture at its current weights."""
        before = decoding_statistics(self.llm) if self.alternates else None
        with self._sampling_parameters(extra_args={"weights": self.model.config.weights}):
            generated = super().generate(*args, **kwargs)
        if before is not None:
            self.decoding.add(decoding_statistics(self.llm).since(before))
        return generated

    def greedy(self, prompts: Sequence[Sequence[int]], alphas: Sequence[float]) -> list[list[int]]:
        """The greedy completion of each prompt at its own alpha, as token ids.

        With an engine in this process they are one batch. TRL's server, tensor parallelism and sleep mode take one set
        of sampling parameters per call, and so one batch per alpha.
        """
        is_one_batch = self.mode == "colocate" and self.tensor_parallel_size == 1 and not self.enable_sleep_mode
        with self._sampling_parameters(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, n=1):
            generate = self._generate_one_batch if is_one_batch else self._generate_by_alpha
            return generate(prompts, alphas)

    def _generate_one_batch(self, prompts: Sequence[Sequence[int]], alphas: Sequence[float]) -> list[list[int]]:
        from vllm import SamplingParams

        shared = {"max_tokens": self.max_completion_length, "repetition_penalty": self.repetition_penalty}
        params = [
            SamplingParams(**shared | self.generation_kwargs | {"extra_args": {"alpha": alpha}}) for alpha in alphas
        ]
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _generate_by_alpha(self, prompts: Sequence[Sequence[int]], alphas: Sequence[float]) -> list[list[int]]:
        completions: dict[int, list[int]] = {}
        for alpha in dict.fromkeys(alphas):
            rows = [i for i, other in enumerate(alphas) if other == alpha]
            with self._sampling_parameters(extra_args={"alpha": alpha}):
                _, ids, _, _ = super().generate([list(prompts[i]) for i in rows], None, 1)
            completions |= zip(rows, map(list, ids), strict=True)
        return [completions[i] for i in range(len(prompts))]

    @contextmanager
    def _sampling_parameters(self, **parameters: Any) -> Iterator[None]:
        """Add sampling parameters within the context."""
        original = self.generation_kwargs
        self.generation_kwargs = original | parameters
        try:
            yield
        finally:
            self.generation_kwargs = original


@contextmanager
def mixture_for_vllm(model: LogitMixForCausalLM, tokenizer: Any, args: LogitMixGRPOConfig) -> Iterator[None]:
    """Within the context TRL's trainer builds a `MixtureVLLMGeneration`, and vLLM finds the mixture on disk.

    The policy is saved in `output_dir/.vllm`, which all processes need to see, and removed once vLLM has loaded it;
    vLLM reads the anchors from their own folders, or from `.vllm` too where they were not loaded from a folder. With
    `vllm_mode="server"` nothing is saved, since the server has loaded the mixture itself. Raises `ValueError` as
    `validate_architectures` and `alternates`.
    """
    generation = partial(MixtureVLLMGeneration, alternates=alternates(args, model))
    state, folder, original_name = PartialState(), Path(args.output_dir) / ".vllm", model.name_or_path
    if model.config.quantized_models:
        raise ValueError(
            f"{model.config.quantized_models[0]} has quantised weights, and vLLM holds the members of a mixture in "
            "one dtype; leave out its quantisation, or use_vllm"
        )
    if args.vllm_mode == "colocate":
        validate_architectures(model.config)
        if state.is_main_process:
            save_by_reference(model, folder)
            tokenizer.save_pretrained(folder)
        state.wait_for_everyone()
        model.name_or_path = str(folder)
    try:
        with generation_class(generation):
            yield
    finally:
        model.name_or_path = original_name
        if state.is_main_process:  # TRL waits for all processes when its vLLM has started
            shutil.rmtree(folder, ignore_errors=True)


def alternates(args: LogitMixGRPOConfig, model: LogitMixForCausalLM) -> bool:
    """Whether the members take turns in vLLM: with `decoding="auto"` on a CPU only.

    Raises `ValueError` if `decoding="alternating"` is not possible.
    """
    obstacles = {
        "vllm_mode 'server', where vLLM is not started here": args.vllm_mode != "colocate",
        f"{len(model.config.members)} members: it takes 2": len(model.config.members) != 2,
        "members that share one model through adapters": len(model.config.model_names) != len(model.config.members),
        f"vllm_tensor_parallel_size {args.vllm_tensor_parallel_size}": args.vllm_tensor_parallel_size > 1,
        "vllm_enable_sleep_mode": args.vllm_enable_sleep_mode,
    }
    reason = next((reason for reason, is_met in obstacles.items() if is_met), None)
    if args.decoding == "alternating" and reason is not None:
        raise ValueError(
            f"alternating decoding in vLLM cannot be used with {reason}; set decoding to 'joint' or 'auto'"
        )
    is_wanted = args.decoding == "alternating" or (args.decoding == "auto" and args.device.type == "cpu")
    return is_wanted and reason is None


def validate_architectures(config: LogitMixConfig) -> None:
    """Raise `ValueError` for a member that vLLM runs through transformers' classes.

    vLLM replaces methods of these classes for the whole process, after which the trainer's own model fails.
    """
    from vllm import ModelRegistry

    for name in config.model_names:
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(getattr(config, name).model_type)
        registered = ModelRegistry.models.get(architecture)
        if getattr(registered, "class_name", "").startswith("Transformers"):
            raise ValueError(
                f"the member {name} is a {architecture}, which vLLM runs through transformers' own classes and "
                "changes in this process; set vllm_mode='server', or leave out use_vllm"
            )


def sampling_parameters(
    generation_kwargs: dict[str, Any] | None,
    stop_strings: Sequence[str],
    eos_token_ids: Sequence[int],
    added_tokens: Collection[str] = (),
) -> dict[str, Any]:
    """vLLM's sampling parameters for `generation_kwargs`, with its parameters for what ends a completion.

    `added_tokens` are those of the tokenizer, which stop strings may contain. transformers' `min_new_tokens`
    is vLLM's `min_tokens`; all other `generation_kwargs` are already vLLM's.
    """
    parameters = dict(generation_kwargs or {})
    if "min_new_tokens" in parameters:
        parameters["min_tokens"] = parameters.pop("min_new_tokens")
    if stop_strings:
        parameters |= {"stop": list(stop_strings), "include_stop_str_in_output": True}
    if any(token in stop for stop in stop_strings for token in added_tokens):
        parameters["skip_special_tokens"] = False  # a server's tokenizer may drop it from the text that is searched
    return {"stop_token_ids": list(eos_token_ids)} | parameters
