"""What serving/alternating assumes of vLLM: its two model runners, its scheduler, and its rejection samplers.

The source is read, of the installed version and of the newest; nothing of it is imported.
"""

import ast

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.vllm_sources import REASONS, SOURCES

RUNNER, SAMPLER = "vllm.v1.worker.gpu_model_runner", "vllm.v1.sample.rejection_sampler"
SCHEDULER = "vllm.v1.core.sched.scheduler"
V2 = "vllm.v1.worker.gpu"
SECOND = f"{V2}.model_runner"


def assert_text_has(vllm, module, path, *fragments):
    text = vllm.text(module, path)
    missing = [fragment for fragment in fragments if fragment not in text]
    assert not missing, f"{vllm}: {path} no longer contains {missing}"


def assert_takes(vllm, module, path, *names):
    """The parameters begin with these."""
    assert tuple(vllm.parameters(module, path)[: len(names)]) == names, f"{vllm}: {path}"


@pytest.mark.skipif(SOURCES["installed"] is None, reason=REASONS["installed"])
def test_the_installed_version_is_the_one_that_the_patches_were_written_for():
    patches = ast.parse((ROOT / "logitmix/serving/alternating/vllm_patches.py").read_text())
    assert f"vLLM {'.'.join(SOURCES['installed'].version.split('.')[:2])}" in ast.get_docstring(patches)


def test_take_turns_changes_the_class_of_a_runner_that_the_worker_has_made(vllm):
    assert_text_has(vllm, "vllm.v1.worker.cpu_worker", "CPUWorker.init_device", "self.model_runner")
    assert_takes(vllm, RUNNER, "GPUModelRunner.load_model", "self")
    assert_takes(vllm, RUNNER, "GPUModelRunner.get_model", "self")
    assert_takes(vllm, "vllm.v1.worker.gpu_worker", "Worker.reload_weights", "self")
    # a proposer of a custom class is made with the configuration alone, and loaded on a CPU
    assert_takes(vllm, "vllm.v1.spec_decode.custom_class_proposer", "create_custom_proposer", "vllm_config")
    source = "self.drafter.load_model(self.model)"
    assert_text_has(vllm, "vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", source)


def test_execute_model_leaves_the_logits_for_sample_tokens(vllm):
    assert_takes(vllm, RUNNER, "GPUModelRunner.execute_model", "self", "scheduler_output")
    assert "logits" in vllm.fields(RUNNER, "ExecuteModelState")
    source = (
        "logits = self.model.compute_logits(sample_hidden_states)",
        "self.execute_model_state = ExecuteModelState(",
    )
    assert_text_has(vllm, RUNNER, "GPUModelRunner.execute_model", *source)
    assert_text_has(vllm, RUNNER, "GPUModelRunner.sample_tokens", "self._sample(logits, spec_decode_metadata)")
    # rows of logits: of each request in the batch's order, one after its last token, and one after each draft
    source = "num_sampled_tokens = num_draft_tokens + 1", "cu_num_scheduled_tokens - num_sampled_tokens"
    assert_text_has(vllm, RUNNER, "GPUModelRunner._calc_spec_decode_metadata", *source)


def test_sample_takes_draft_probabilities_and_minus_one_as_no_token(vllm):
    assert_takes(vllm, RUNNER, "GPUModelRunner._sample", "self", "logits", "spec_decode_metadata")
    source = "self._get_spec_decode_draft_probs(spec_decode_metadata)", "self.rejection_sampler("
    assert_text_has(vllm, RUNNER, "GPUModelRunner._sample", *source)
    source = "PLACEHOLDER_TOKEN_ID", "valid_mask.flatten()"
    assert_text_has(vllm, SAMPLER, "RejectionSampler.parse_output", *source)
    # two columns are read by `parse_output`
    source = "if max_gen_len == 1:", "RejectionSampler.parse_output"
    assert_text_has(vllm, RUNNER, "GPUModelRunner._bookkeeping_sync", *source)
    # penalties and masks are applied to the logits that the runner hands over
    source = "self.apply_logits_processors(", "apply_sampling_constraints("
    assert_text_has(vllm, SAMPLER, "RejectionSampler.forward", *source)


def test_drafts_are_proposed_after_the_tokens_are_known(vllm):
    names = ("self", "scheduler_output", "sampled_token_ids", "sampling_metadata")
    assert_takes(vllm, RUNNER, "GPUModelRunner.propose_draft_token_ids", *names)
    source = "self._input_fits_in_drafter(", "propose_draft_token_ids(valid_sampled_token_ids)"
    assert_text_has(vllm, RUNNER, "GPUModelRunner.sample_tokens", *source)


def test_the_scheduler_counts_computed_tokens_as_alternating_decoding_does(vllm):
    source = "request.num_computed_tokens += num_scheduled_token"
    assert_text_has(vllm, SCHEDULER, "Scheduler._update_after_schedule", source)
    # a new request of one token gets an invalid draft unless `num_spec_tokens` is 0
    source = (
        "request.num_tokens_with_spec",
        "- request.num_computed_tokens",
        "self.num_spec_tokens > 0 and self.dynamic_sd_lookup is None",
        "self.kv_cache_manager.allocate_slots(",
    )
    assert_text_has(vllm, SCHEDULER, "Scheduler.schedule", *source)
    source = "num_spec_tokens_to_schedule = self.num_spec_tokens"
    assert_text_has(vllm, SCHEDULER, "Scheduler.schedule", source)
    source = "self.make_spec_decoding_stats(", "num_accepted_tokens=num_accepted", "request_id=req_id"
    assert_text_has(vllm, SCHEDULER, "Scheduler.update_from_output", *source)
    assert_takes(vllm, SCHEDULER, "Scheduler.reset_prefix_cache", "self")
    source = "self.is_prefill_chunk", "self.num_computed_tokens"
    assert_text_has(vllm, "vllm.v1.request", "Request.__init__", *source)


def test_blocks_are_cached_when_slots_are_allocated_unless_that_is_delayed(vllm):
    module, source = "vllm.v1.core.kv_cache_manager", ("if delay_cache_blocks:", "self.coordinator.cache_blocks")
    assert_text_has(vllm, module, "KVCacheManager.allocate_slots", *source)
    assert_takes(vllm, module, "KVCacheManager.cache_blocks", "self", "request", "num_computed_tokens")


def test_the_second_runner_is_refused_for_custom_drafts_by_their_method(vllm):
    path = "VllmConfig._get_v2_model_runner_unsupported_features"
    assert_text_has(vllm, "vllm.config.vllm", path, "'custom_class'", "speculative_config.method")
    source = "self._get_v2_model_runner_unsupported_features()"
    assert_text_has(vllm, "vllm.config.vllm", "VllmConfig.use_v2_model_runner", source)
    assert_text_has(vllm, "vllm.config.vllm", "VllmConfig._validate_v2_model_runner", source)


def test_the_second_runner_makes_what_drafts_before_it_loads_the_model(vllm):
    assert_takes(vllm, f"{V2}.spec_decode", "init_speculator", "vllm_config", "device")
    source = "self.speculator = init_speculator(self.vllm_config, self.device"
    assert_text_has(vllm, SECOND, "GPUModelRunner.__init__", source)
    source = "self.sampler, self.rejection_sampler = custom", "self.model_state = init_model_state("
    assert_text_has(vllm, SECOND, "GPUModelRunner.load_model", *source)
    names = ("input_batch", "attn_metadata", "slot_mappings", "last_hidden_states", "aux_hidden_states", "num_sampled")
    names = ("self", *names, "num_rejected", "last_sampled", "next_prefill_tokens", "temperature", "seeds")
    assert_takes(vllm, f"{V2}.spec_decode.speculator", "BaseSpeculator.propose", *names)
    assert_takes(
        vllm, f"{V2}.spec_decode.rejection_sampler", "RejectionSampler.__init__", "self", "sampler", "spec_config"
    )
    assert_text_has(vllm, "vllm.v1.worker.gpu_worker", "Worker.__init__", "self.use_v2_model_runner = ")


def test_the_second_runner_counts_tokens_as_its_samplers_say(vllm):
    source = (
        "self.sampler(logits, input_batch)",
        "self.speculator.draft_logits",
        "return (sampler_output, sampler_output.num_sampled, sampler_output.num_rejected)",
    )
    assert_text_has(vllm, SECOND, "GPUModelRunner.sample", *source)
    source = "computed_delta = query_len - num_rejected", "if num_sampled > 0:"
    assert_text_has(vllm, f"{V2}.input_batch", "_post_update_kernel", *source)
    names = "idx_mapping", "cu_num_logits", "logits_indices", "positions", "input_ids", "req_ids", "num_reqs"
    assert set(names) <= set(vllm.fields(f"{V2}.input_batch", "InputBatch"))
    assert {"sampled_token_ids", "num_sampled", "num_rejected"} <= set(
        vllm.fields(f"{V2}.sample.output", "SamplerOutput")
    )


def test_the_second_runner_keeps_drafts_and_takes_their_logits_before_temperature(vllm):
    source = (
        "draft_tokens[:, num_spec_tokens:] = -1",
        "self.req_states.draft_tokens[input_batch.idx_mapping] = draft_tokens",
    )
    assert_text_has(vllm, SECOND, "GPUModelRunner.sample_tokens", *source)
    names = "logits", "expanded_idx_mapping", "temperature", "seed", "pos", "apply_temperature", "is_drafting"
    assert_takes(vllm, f"{V2}.sample.gumbel", "gumbel_sample", *names)
    # draft logits are those of the request's slot, divided by its temperature
    source = "draft_logits_ptr + req_state_idx * draft_logits_stride_0", "/ temp"
    assert_text_has(vllm, f"{V2}.spec_decode.rejection_sampler_utils", "_resample_kernel", *source)
    assert "DraftTokenIds" in vllm.exports("vllm.v1.outputs")
    assert vllm.fields("vllm.v1.outputs", "DraftTokenIds")[:2] == ["req_ids", "draft_token_ids"]
