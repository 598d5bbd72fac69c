"""Every name and signature of vLLM that the package uses, in the installed version and in the newest wheel.

The source is read and not imported, so the newest wheel needs neither its CUDA libraries nor its version of torch.
"""

import ast
import re
from importlib.metadata import requires, version
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.vllm_sources import SOURCES


def imported_names() -> list[tuple[str, str]]:
    """Each module of vLLM that the package imports, with the name that it imports from it."""
    found = set()
    for path in (ROOT / "logitmix").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vllm"}
    return sorted(found)


def test_every_imported_name_exists(vllm):
    imported = imported_names()
    assert len(imported) > 30
    missing = [
        f"{module}:{name}"
        for module, name in imported
        if not vllm.has(module) or (name and name not in vllm.exports(module) and not vllm.has(f"{module}.{name}"))
    ]
    assert missing == [], vllm


V2 = "vllm.v1.worker.gpu"
DEFAULT_STATE = (f"{V2}.model_states.default", "DefaultModelState")

# functions that the package calls or overrides, with the parameters that it relies on, in this order
PARAMETERS = [
    # the second model runner
    (*DEFAULT_STATE, ["self", "vllm_config", "model", "encoder_cache", "device"]),
    (DEFAULT_STATE[0], "DefaultModelState.add_request", ["self", "req_index", "new_req_data"]),
    (DEFAULT_STATE[0], "DefaultModelState.remove_request", ["self", "req_id"]),
    (DEFAULT_STATE[0], "DefaultModelState.apply_staged_writes", ["self"]),
    (DEFAULT_STATE[0], "DefaultModelState.prepare_inputs", ["self", "input_batch", "req_states"]),
    (DEFAULT_STATE[0], "DefaultModelState.prepare_dummy_inputs", ["self", "num_reqs", "num_tokens"]),
    (DEFAULT_STATE[0].replace("default", "interface"), "ModelState.custom_sampler", ["self", "sampler"]),
    (f"{V2}.buffer_utils", "StagedWriteTensor", ["self", "size", "dtype", "device"]),
    (f"{V2}.buffer_utils", "StagedWriteTensor.stage_write", ["self", "index", "start", "x"]),
    (f"{V2}.buffer_utils", "StagedWriteTensor.apply_write", ["self"]),
    (f"{V2}.sample.logits_processor.interface", "LogitsProcessor.validate_params", ["cls", "sampling_params"]),
    (f"{V2}.sample.logits_processor.interface", "LogitsProcessor.add_request", ["self", "req_idx", "sampling_params"]),
    (f"{V2}.sample.logits_processor.interface", "LogitsProcessor.apply", ["self", "logits", "ctx"]),
    # the first model runner
    ("vllm.v1.sample.logits_processor.interface", "LogitsProcessor.validate_params", ["cls", "sampling_params"]),
    ("vllm.v1.sample.logits_processor.interface", "LogitsProcessor.update_state", ["self", "batch_update"]),
    ("vllm.v1.sample.logits_processor.interface", "LogitsProcessor.apply", ["self", "logits"]),
    (
        "vllm.v1.sample.logits_processor.interface",
        "LogitsProcessor.__init__",
        ["self", "vllm_config", "device", "is_pin_memory"],
    ),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._update_states", ["self", "scheduler_output"]),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.execute_model", ["self", "scheduler_output"]),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._sample", ["self", "logits", "spec_decode_metadata"]),
    (
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ["self", "scheduler_output", "model_runner_output"],
    ),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.cache_blocks", ["self", "request", "num_computed_tokens"]),
    (
        "vllm.v1.sample.rejection_sampler",
        "apply_sampling_constraints",
        ["logits", "cu_num_draft_tokens", "sampling_metadata"],
    ),
    ("vllm.v1.sample.ops.topk_topp_sampler", "random_sample", ["probs", "generators"]),
    ("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer.load_model", ["self", "target_model"]),
    (f"{V2}.spec_decode.speculator", "DraftModelSpeculator.load_model", ["self", "target_model"]),
    (
        "vllm.v1.spec_decode.llm_base_proposer",
        "compute_probs_and_sample_next_token",
        ["logits", "sampling_metadata", "use_fp64_gumbel"],
    ),
    ("vllm.sampling_params", "SamplingParams.verify", ["self", "model_config", "speculative_config"]),
    # configuration
    ("vllm.config.vllm", "VllmConfig.use_v2_model_runner", ["self"]),
    ("vllm.config.vllm", "VllmConfig.with_hf_config", ["self", "hf_config", "architectures"]),
    ("vllm.config.model", "ModelConfig.get_model_arch_config", ["self"]),
    ("vllm.config.model", "ModelConfig.get_sliding_window", ["self"]),
    ("vllm.config.parallel", "ParallelConfig.use_ubatching", ["self"]),
    ("vllm.model_executor.models.config", "VerifyAndUpdateConfig.verify_and_update_config", ["vllm_config"]),
    ("vllm.model_executor.models.config", "VerifyAndUpdateConfig.verify_and_update_model_config", ["model_config"]),
    # the model
    ("vllm.model_executor.model_loader.utils", "initialize_model", ["vllm_config", "prefix"]),
    ("vllm.model_executor.models.utils", "maybe_prefix", ["prefix", "name"]),
    ("vllm.model_executor.models.utils", "AutoWeightsLoader.load_weights", ["self", "weights"]),
    ("vllm.compilation.backends", "set_model_tag", ["tag"]),
    (
        "vllm.model_executor.layers.attention.attention",
        "Attention.forward",
        ["self", "query", "key", "value", "output_shape", "output_dtype"],
    ),
    (
        "vllm.model_executor.model_loader.reload.inplace",
        "reload_weights",
        ["vllm_config", "model", "weights_iterator", "weights_path", "is_checkpoint_format"],
    ),
    (
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.process_weights_after_loading",
        ["self", "layer"],
    ),
    # the server and the engine
    ("vllm.engine.protocol", "EngineClient.generate", ["self", "prompt", "sampling_params", "request_id"]),
    ("vllm.entrypoints.llm", "LLM.generate", ["self", "prompts", "sampling_params"]),
    ("vllm.entrypoints.llm", "LLM.reset_prefix_cache", ["self", "reset_running_requests"]),
]


@pytest.mark.parametrize(("module", "path", "names"), PARAMETERS, ids=[path for _, path, _ in PARAMETERS])
def test_a_function_takes_the_parameters_that_the_package_passes(vllm, module, path, names):
    found = vllm.parameters(module, path)
    assert [name for name in found if name in names] == names, f"{vllm}: {path} takes {found}"


# fields of classes
FIELDS = [
    ("vllm.v1.core.sched.output", "SchedulerOutput", ["scheduled_spec_decode_tokens"]),
    ("vllm.v1.worker.gpu_input_batch", "CachedRequestState", ["sampling_params"]),
    (f"{V2}.input_batch", "InputBatch", ["num_reqs", "idx_mapping", "query_start_loc", "num_tokens_after_padding"]),
    ("vllm.v1.core.sched.output", "NewRequestData", ["req_id", "sampling_params"]),
    ("vllm.config.vllm", "VllmConfig", ["model_config", "parallel_config", "cache_config", "instance_id"]),
    ("vllm.config.parallel", "ParallelConfig", ["pipeline_parallel_size", "prefill_context_parallel_size"]),
    ("vllm.config.model", "ModelConfig", ["logits_processors", "logprobs_mode", "max_model_len"]),
    ("vllm.config.model", "ModelConfig", ["enable_prompt_embeds"]),
    ("vllm.config.cache", "CacheConfig", ["kv_offloading_size"]),
    ("vllm.config.vllm", "VllmConfig", ["kv_transfer_config"]),
    ("vllm.sampling_params", "SamplingParams", ["thinking_token_budget", "structured_outputs", "logprob_token_ids"]),
    ("vllm.config.compilation", "CompilationConfig", ["static_forward_context"]),
    ("vllm.config.speculative", "SpeculativeConfig", ["target_model_config"]),
    ("vllm.config.model", "ModelConfig", ["runner"]),
    ("vllm.forward_context", "ForwardContext", ["attn_metadata"]),
    ("vllm.v1.kv_cache_interface", "AttentionSpec", ["num_kv_heads"]),
    ("vllm.sampling_params", "SamplingParams", ["extra_args", "prompt_logprobs", "min_tokens", "stop_token_ids"]),
    ("vllm.engine.protocol", "EngineClient", ["model_config"]),
]


@pytest.mark.parametrize(("module", "path", "names"), FIELDS, ids=[path for _, path, _ in FIELDS])
def test_a_class_has_the_fields_that_the_package_reads(vllm, module, path, names):
    found = vllm.fields(module, path)
    assert set(names) <= set(found), f"{vllm}: {path} has the fields {found}"


# what vLLM does at a place that no signature shows
BEHAVIOUR = [
    # the second runner is the default where there is Triton
    ("vllm.config.vllm", "VllmConfig.use_v2_model_runner", "if not HAS_TRITON"),
    ("vllm.config.vllm", "VllmConfig.use_v2_model_runner", "unsupported = self._get_v2_model_runner_unsupported"),
    (f"{V2}.model_states", "resolve_model_state_cls", "return model.get_model_state_cls()"),
    (f"{V2}.model_states.interface", "ModelState.__init__", "self.max_num_reqs = "),
    (f"{V2}.model_states.interface", "ModelState.__init__", "self.max_num_tokens = "),
    (f"{V2}.buffer_utils", "StagedWriteTensor.__init__", "self.gpu = torch.zeros(size"),
    # the requests' weights are written before the forward pass, and forgotten when a request ends or is preempted
    (f"{V2}.model_runner", "GPUModelRunner.add_requests", "self.model_state.add_request(req_index, new_req_data)"),
    (f"{V2}.model_runner", "GPUModelRunner.add_requests", "self.model_state.apply_staged_writes()"),
    (f"{V2}.model_runner", "GPUModelRunner._remove_request", "self.model_state.remove_request(req_id)"),
    # `prepare_inputs` runs before each forward pass, and `prepare_dummy_inputs` before each capture of a graph
    (f"{V2}.model_runner", "GPUModelRunner.execute_model", "**self.model_state.prepare_inputs(input_batch, self.req"),
    (f"{V2}.cudagraph_utils", "ModelCudaGraphManager.capture", "**model_state.prepare_dummy_inputs(num_reqs, num_"),
    # rows of the result of `forward` reach `compute_logits` unchanged
    (
        f"{V2}.model_runner",
        "GPUModelRunner.sample",
        "sample_hidden_states = hidden_states[input_batch.logits_indices]",
    ),
    (f"{V2}.model_runner", "GPUModelRunner.sample", "logits = self.model.compute_logits(sample_hidden_states)"),
    (f"{V2}.sample.prompt_logprob", "compute_prompt_logprobs_with_chunking", "logits_fn(prompt_hidden_states[start_"),
    # the first runner's batch is final once `_update_states` has run, before the forward pass
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.execute_model", "self._update_states(scheduler_output)"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._update_states", "self._may_reorder_batch(scheduler_output)"),
    # a batch that is split in two would not split the requests' weights, so it is refused
    (f"{V2}.ubatch_utils", "slice_model_inputs", "('input_ids', 'inputs_embeds')"),
    ("vllm.v1.engine.input_processor", "InputProcessor", "build_custom_logits_processors_params_validator(custom_"),
    ("vllm.v1.engine.input_processor", "InputProcessor", "validate_logits_processors_parameters"),
    ("vllm.config.vllm", "VllmConfig._get_v2_model_runner_unsupported_features", "'suffix'"),
    # without the prompt's text, where it returns token ids
    (
        "vllm.entrypoints.openai.completion.serving",
        "OpenAIServingCompletion.request_output_to_completion_response",
        "prompt_text = ''",
    ),
    ("vllm.config.vllm", "VllmConfig.__post_init__", "self.try_verify_and_update_config()"),
    ("vllm.config.vllm", "VllmConfig.try_verify_and_update_config", "cls.verify_and_update_config(self)"),
    ("vllm.v1.engine.core", "EngineCore._initialize_kv_caches", "get_kv_cache_configs(vllm_config, kv_cache_specs, "),
    (
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer._sample_from_logits",
        "return compute_probs_and_sample_next_token(logits, sampling_metadata, self.use_fp64_gumbel)",
    ),
    # a draft model is built after the target is loaded, and knows both from its configuration
    ("vllm.config.speculative", "SpeculativeConfig.__post_init__", "runner='draft'"),
    ("vllm.v1.spec_decode.draft_model", "DraftModelProposer._create_draft_vllm_config", "=spec.draft_model_config"),
    (
        f"{V2}.spec_decode.standalone_ar.speculator",
        "StandaloneARSpeculator.load_draft_model",
        "model_config=self.draft_model_config",
    ),
    ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", "self.drafter.load_model(self.model)"),
    # the first runner hands draft models the block table of the first group of the KV cache
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._build_attention_metadata",
        "if self.speculative_config and spec_decode_common_attn_metadata is None:",
    ),
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.initialize_metadata_builders",
        "self.drafter.initialize_attn_backend(kv_cache_config",
    ),
    # it takes the attention layers that the draft adds, where one names those of the target
    ("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer.load_model", "self._draft_attn_layer_names = "),
    (f"{V2}.spec_decode.speculator", "DraftModelSpeculator.load_model", "self.draft_attn_layer_names = set(all_attn_"),
    (
        f"{V2}.spec_decode.speculator",
        "DraftModelSpeculator.set_attn",
        "active_layer_names=self.draft_attn_layer_names",
    ),
    ("vllm.entrypoints.launchers.api_server.app_state", "init_app_state", "state.engine_client = engine_client"),
]


@pytest.mark.parametrize(("module", "path", "fragment"), BEHAVIOUR, ids=[f"{p}: {f}" for _, p, f in BEHAVIOUR])
def test_vllm_does_what_the_package_relies_on(vllm, module, path, fragment):
    assert fragment in vllm.text(module, path), vllm


def test_the_second_runner_is_the_default(vllm):
    assert vllm.text("vllm.config.vllm", "VllmConfig.use_v2_model_runner").endswith("return True"), vllm


TABLE = re.compile(
    r"\| [^|]+ \| (?P<first>[^|]+) \| (?P<second>[^|]+) \| (?P<newest>[^|]+) \| `(?P<test>test_\w+)` \|"
)
STATES = {"tested", "contract", "refused", "GPU", "-"}


def documented() -> list[dict[str, str]]:
    """The rows of the table of features in docs/serving.md."""
    lines = (ROOT / "docs/serving.md").read_text().splitlines()
    return [row.groupdict() for row in map(TABLE.match, lines) if row]


def marks_of_tests() -> dict[str, set[str]]:
    """The marks of each test in this folder, those of its module included."""
    found = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        body = ast.parse(path.read_text()).body
        shared = [
            node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        ]
        for node in ast.walk(ast.Module(body, [])):
            if isinstance(node, ast.FunctionDef):
                text = " ".join(map(ast.unparse, [*shared, *node.decorator_list]))
                found[node.name] = set(re.findall(r"pytest\.mark\.(\w+)", text))
    return found


def test_each_row_of_the_documented_table_names_a_test_that_runs_on_the_runners_it_claims():
    rows, marks = documented(), marks_of_tests()
    assert len(rows) > 15
    for row in rows:
        states = [row["first"], row["second"], row["newest"]]
        assert set(states) <= STATES, row
        assert row["test"] in marks, row
        assert (row["second"] == "tested") == ("runners" in marks[row["test"]]), row
        assert ("GPU" in states) == ("gpu" in marks[row["test"]]), row


def test_beam_search_has_no_place_for_a_requests_weights(vllm):
    """The server refuses them together; when this fails, it need not."""
    assert "extra_args" not in vllm.fields("vllm.sampling_params", "BeamSearchParams"), vllm


def test_the_documented_versions_that_trl_declares():
    (declared,) = [r for r in requires("trl") or [] if r.startswith("vllm")]
    assert "TRL 1.16 declares vLLM\n0.22 to 0.31" in (ROOT / "docs/serving.md").read_text()
    assert version("trl").startswith("1.16")
    assert {">=0.22.0", "<=0.31.0"} == set(declared.partition(";")[0].strip().removeprefix("vllm").split(","))


def test_the_documented_versions_are_those_that_are_tested(vllm):
    heading = next(line for line in (ROOT / "docs/serving.md").read_text().splitlines() if "| first runner, " in line)
    first, second, newest = re.findall(r"\d+\.\d+", heading)
    assert first == second
    column = first if vllm is SOURCES["installed"] else newest
    assert ".".join(vllm.version.split(".")[:2]) == column, vllm
