"""Rollouts of a mixture in vLLM, through TRL.

vLLM holds the mixture as one model (see `logitmix.serving`). At each sync only what trains is pushed, since the rest
is frozen; alpha is not pushed at all: every request carries the weights in force.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import GRPOConfig
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.modeling import LogitMixForCausalLM

POLICY = "policy."


class MixtureVLLMGeneration(VLLMGeneration):
    """TRL's `VLLMGeneration` for a mixture."""

    model: LogitMixForCausalLM
    generation_kwargs: dict[str, Any]
    # vLLM's sleep at level 2 discards the frozen weights too, so that all has to be pushed again
    _pushes_all = False

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        if self._pushes_all:
            yield from super()._iter_named_params()
            return
        mixture = self.model
        trained = {name for name, parameter in mixture.policy.named_parameters() if parameter.requires_grad}
        self.model = mixture.policy
        try:
            for name, parameter in super()._iter_named_params():
                if name in trained:
                    yield POLICY + name, parameter
        finally:
            self.model = mixture

    def sync_weights(self) -> None:
        """Push the policy's trained weights (after a deep sleep, all) into vLLM, and forget its cached prefixes."""
        self._pushes_all = self.mode == "colocate" and self._llm_weights_sleeping
        is_adapter = "policy" in self.model.config.adapters
        if self.mode == "colocate" and self.accelerator.device.type == "cpu" and not is_adapter:
            self._reload_on_cpu()
            self.llm.reset_prefix_cache()
        else:
            super().sync_weights()

    def _reload_on_cpu(self) -> None:
        """vLLM repacks the weights of linear layers for the CPU, after which tensors cannot be loaded one by one."""
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        engine = self.llm.llm_engine
        model = engine.model_executor.driver_worker.model_runner.model
        weights = ((name, parameter.detach()) for name, parameter in self._iter_named_params())
        if not self._pushes_all:  # of the policy's layers alone: vLLM walks through all that it is given
            model = model.policy
            weights = ((name.removeprefix(POLICY), weight) for name, weight in weights)
        reload_weights(engine.vllm_config, model, weights, weights_path=None, is_checkpoint_format=True)

    def generate(self, *args: Any, **kwargs: Any) -> tuple:
        """TRL's, from the mixture at its weights."""
        with self._asking(extra_args={"weights": self.model.config.weights}):
            return super().generate(*args, **kwargs)

    def greedy(self, prompts: Sequence[Sequence[int]], alphas: Sequence[float]) -> list[list[int]]:
        """The greedy completion of each prompt under its own alpha.

        One batch, where vLLM is in this process; TRL's server and its tensor parallelism take one alpha at a time.
        """
        from vllm import SamplingParams

        with self._asking(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, n=1):
            if self.mode == "colocate" and self.tensor_parallel_size == 1 and not self.enable_sleep_mode:
                shared = {"max_tokens": self.max_completion_length, "repetition_penalty": self.repetition_penalty}
                params = [
                    SamplingParams(**shared | self.generation_kwargs | {"extra_args": {"alpha": alpha}})
                    for alpha in alphas
                ]
                asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
                outputs = self.llm.generate(asked, params, use_tqdm=False)
                return [list(output.outputs[0].token_ids) for output in outputs]
            completions: dict[int, list[int]] = {}
            for alpha in dict.fromkeys(alphas):
                rows = [i for i, other in enumerate(alphas) if other == alpha]
                with self._asking(extra_args={"alpha": alpha}):
                    _, ids, _, _ = super().generate([list(prompts[i]) for i in rows], None, 1)
                completions |= zip(rows, ids, strict=True)
            return [completions[i] for i in range(len(prompts))]

    @contextmanager
    def _asking(self, **sampling: Any) -> Iterator[None]:
        """More sampling parameters for a while."""
        own = self.generation_kwargs
        self.generation_kwargs = own | sampling
        try:
            yield
        finally:
            self.generation_kwargs = own


@contextmanager
def mixture_for_vllm(model: LogitMixForCausalLM, tokenizer: Any, args: GRPOConfig) -> Iterator[None]:
    """While TRL's trainer is built, vLLM finds the mixture on the disk, and rollouts are `MixtureVLLMGeneration`'s.

    All processes have to see `output_dir`. What vLLM has loaded is removed afterwards; TRL's server has loaded the
    mixture by itself.
    """
    state, folder, own_name = PartialState(), Path(args.output_dir) / ".vllm", model.name_or_path
    if args.vllm_mode == "colocate":
        validate_architectures(model.config)
        if state.is_main_process:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        state.wait_for_everyone()
        model.name_or_path = str(folder)
    trls, grpo_trainer.VLLMGeneration = grpo_trainer.VLLMGeneration, MixtureVLLMGeneration
    try:
        yield
    finally:
        grpo_trainer.VLLMGeneration = trls
        model.name_or_path = own_name
        if state.is_main_process:  # TRL waits for all processes when its vLLM has started
            shutil.rmtree(folder, ignore_errors=True)


def validate_architectures(config: LogitMixConfig) -> None:
    """Raise `ValueError` for a member that vLLM runs by transformers' classes.

    It changes them for the whole process, after which the trainer's own model of that class fails.
    """
    from vllm import ModelRegistry

    for name in config.model_names:
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(getattr(config, name).model_type)
        known = ModelRegistry.models.get(architecture)
        if getattr(known, "class_name", "").startswith("Transformers"):
            raise ValueError(
                f"the member {name} is a {architecture}, which vLLM runs by transformers' own classes and changes in "
                "this process; set vllm_mode='server', or leave out use_vllm"
            )


def sampling_settings(
    given: dict[str, Any] | None, stop_strings: Sequence[str], eos_token_ids: Sequence[int]
) -> dict[str, Any]:
    """vLLM's sampling parameters for what ends a completion; transformers' `min_new_tokens` is its `min_tokens`."""
    settings = dict(given or {})
    if "min_new_tokens" in settings:
        settings["min_tokens"] = settings.pop("min_new_tokens")
    if stop_strings:
        settings |= {"stop": list(stop_strings), "include_stop_str_in_output": True}
    return {"stop_token_ids": list(eos_token_ids)} | settings
