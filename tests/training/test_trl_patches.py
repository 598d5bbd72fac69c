"""What training/trl_patches.py assumes of TRL. A failure here names TRL's version, before anything else breaks."""

import inspect
from importlib.metadata import version

import pytest
import torch
import trl.trainer.utils
from trl import GRPOTrainer, SFTTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler

from logitmix.training import trl_patches
from logitmix.training.batch import TokenScores
from logitmix.training.rollouts.trl_patches import generation_class
from logitmix.training.trl_patches import PatchedGRPOTrainer
from tests.helpers.contracts import assert_has, assert_parameters, assert_source_has
from tests.helpers.grpo import generated, mixture, trainer_of

PARAMETERS = {
    "_generate_single_turn": ("self", "prompt_ids"),
    "_generate": ("self", "prompts"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("self", "inputs"),
    "_get_per_token_logps_and_entropies": ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
    "_compute_loss": ("self", "model", "inputs"),
    "_get_train_sampler": ("self", "dataset"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_tokenize_prompts": ("self", "prompts"),
    "training_step": ("self", "model", "inputs"),
    "log": ("self", "logs", "start_time"),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_trls_trainer_has_the_methods_that_we_replace(name):
    assert_has("trl", GRPOTrainer, name)
    assert_parameters("trl", getattr(GRPOTrainer, name), *PARAMETERS[name])


def test_each_method_is_replaced_once():
    """The patches route TRL's private methods; grpo.py overrides the public names they are routed to."""
    from logitmix.training.grpo import LogitMixGRPOTrainer

    assert not [name for name in PARAMETERS if name in vars(LogitMixGRPOTrainer)]
    assert LogitMixGRPOTrainer.__bases__ == (PatchedGRPOTrainer,)


def test_trl_calls_the_methods_that_we_replace():
    calls = {
        "_generate_and_score_completions": (
            "self._generate(",
            "self._calculate_rewards(",
            "self._get_per_token_logps_and_entropies(",
            "self.ref_model,",
        ),
        "_generate": ("self._tokenize_prompts(", "self._generate_single_turn("),
        "_prepare_inputs": ("self._generate_and_score_completions(", "self._buffered_inputs", "self._step"),
        "compute_loss": ("self._compute_loss(",),
    }
    for name, fragments in calls.items():
        assert_source_has("trl", inspect.unwrap(getattr(GRPOTrainer, name)), *fragments)


def test_trls_loss_scores_once_and_reads_the_loss_type_from_the_trainer():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert source.count("self._get_per_token_logps_and_entropies(") == 1, f"trl {version('trl')}"
    assert_source_has("trl", GRPOTrainer._compute_loss, 'elif self.loss_type in ["cispo", "dapo", "vespo"]')
    init = inspect.getsource(GRPOTrainer.__init__)
    assert init.count("self.loss_type = args.loss_type") == 1, f"trl {version('trl')}"


def test_trls_trainers_keep_the_private_state_that_we_read(tmp_path):
    trainer = trainer_of(tmp_path)
    assert_has(
        "trl", trainer, "_metrics", "_logs", "_step", "_buffered_inputs", "_total_train_tokens", "_pending_metrics",
        "_pending_extra_logs", "_tokenizer", "_is_vlm", "_dist", "_entropy_bonus_enabled",
    )  # fmt: skip
    assert_has("trl", trainer._dist, "summon_full_params")
    assert set(trainer._metrics) == {"train", "eval"}, f"trl {version('trl')}"
    assert {"prompt", "completion", "rewards", "advantages"} <= set(trainer._logs), f"trl {version('trl')}"
    assert_source_has("trl", GRPOTrainer, "self._last_loaded_step")
    assert_source_has("trl", SFTTrainer, "self._total_train_tokens", "self._metrics")


def test_trl_loads_a_reference_model_only_where_beta_is_not_0():
    assert_source_has("trl", GRPOTrainer.__init__, "self.beta = args.beta", "if self.beta == 0.0:")


def test_trls_loss_takes_the_scores_it_is_given(tmp_path):
    """The loss of TRL's own scores, of the same scores given, and of other scores."""
    trainer = trainer_of(tmp_path)
    inputs, *_ = generated(trainer)
    trainer.model.train()
    own, scores = trainer.trl_loss(trainer.model, inputs, "dapo")
    given, _ = trainer.trl_loss(trainer.model, inputs, "dapo", scores)
    torch.testing.assert_close(given, own)
    other = TokenScores(scores.log_probs - 1, scores.entropy)
    assert trainer.trl_loss(trainer.model, inputs, "dapo", other)[0] != own


def test_trls_scoring_forward_would_score_a_mixture_as_something_else(tmp_path):
    """Why `install_scoring_forward` exists: TRL's fused head looks for one base model and one output embedding."""
    assert_source_has("trl", trl.trainer.utils.add_fused_lm_head, "get_output_embeddings()")
    model = mixture()
    trl.trainer.utils.add_fused_lm_head(model)
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(AttributeError):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)


def test_trls_scoring_output_is_a_dataclass_with_the_fields_that_we_fill():
    assert {"log_probs", "entropy"} <= set(FusedCausalLMOutput.__dataclass_fields__), f"trl {version('trl')}"


def test_trls_sampler_has_the_arguments_that_we_copy():
    names = ("self", "data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
    assert_parameters("trl", RepeatSampler.__init__, *names)
    assert_source_has("trl", RepeatSampler, "torch.randperm(self.num_samples, generator=self.generator)")


def test_the_version_that_the_patches_were_written_against_is_the_one_installed():
    assert f"TRL {'.'.join(version('trl').split('.')[:2])}" in trl_patches.__doc__


def test_rollouts_in_vllm_find_the_names_of_trl_that_they_replace():
    assert_has("trl", VLLMGeneration, "_iter_named_params", "sync_weights", "generate")
    assert_source_has("trl", VLLMGeneration, "self._llm_weights_sleeping", "self._iter_named_params()")
    assert_source_has("trl", VLLMGeneration._init_vllm, "self.llm = LLM(")  # a name of its module
    assert_source_has("trl", VLLMGeneration.__init__, "self.mode = ", "self._init_vllm()")
    assert_has("trl", grpo_trainer, "VLLMGeneration")
    assert_source_has("trl", GRPOTrainer.__init__, "VLLMGeneration(")


def test_trls_trainer_builds_the_generation_class_given_within_the_context():
    class Replacement(VLLMGeneration):
        pass

    with generation_class(Replacement):
        assert grpo_trainer.VLLMGeneration is Replacement
    assert grpo_trainer.VLLMGeneration is VLLMGeneration


def test_trl_loads_the_reference_through_the_function_that_we_replace():
    assert_has("trl", grpo_trainer, "create_model_from_path")
    assert_source_has("trl", GRPOTrainer.__init__, "self.ref_model = create_model_from_path(")
