"""Every option of TRL that could bring in another head, reference model or engine is in one of three lists.

A new version of TRL with such an option fails here until the option is listed.
"""

import dataclasses
import inspect
import re

import pytest
from trl import GRPOConfig, GRPOTrainer

from logitmix.training.config_checks import LOSS_TYPES_OF_TRL
from tests.helpers.grpo import trainer_of

SUSPECT = re.compile(r"ref_|head|liger|kernel|vllm|continuous|paged|sync|engine|fused|router|kl|beta$|peft|rollout")

# with a value that a mixture must reject
REJECTED = {
    "beta": 0.1,
    "use_liger_kernel": True,
    "cast_lm_head_to_fp32": True,
    "use_transformers_continuous_batching": True,
    "use_transformers_paged": True,
    "sync_ref_model": True,
    "router_aux_loss_coef": 0.1,
}
# only read with an option that is rejected, or with use_vllm
WITHOUT_EFFECT = {
    "liger_kernel_config",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "transformers_continuous_batching_config",
    *(f"vllm_{name}" for name in (
        "mode", "model_impl", "enable_sleep_mode", "structured_outputs_regex", "server_base_url", "server_host",
        "server_port", "server_timeout", "group_port", "gpu_memory_utilization", "max_model_length",
        "tensor_parallel_size", "importance_sampling_correction", "importance_sampling_mode",
        "importance_sampling_clip_max", "importance_sampling_clip_min", "importance_sampling_cap",
    )),
}  # fmt: skip
ALLOWED = {
    "use_vllm",  # rollouts are the mixture's there too: tests/serving
    "use_bias_correction_kl",  # a factor on the KL term, whichever model it is to
}


def test_every_suspect_option_is_listed():
    suspects = {field.name for field in dataclasses.fields(GRPOConfig) if SUSPECT.search(field.name)}
    assert suspects == set(REJECTED) | WITHOUT_EFFECT | ALLOWED


@pytest.mark.filterwarnings("ignore:`use_transformers_paged` is deprecated")
@pytest.mark.parametrize(("option", "value"), REJECTED.items())
def test_a_mixture_rejects_options_that_would_bypass_it(tmp_path, option, value):
    with pytest.raises(ValueError, match=option if option != "use_transformers_paged" else "continuous_batching"):
        trainer_of(tmp_path, loss_type="grpo", **{option: value})


def test_the_loss_types_are_those_of_trl():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    compared = re.findall(r"self\.loss_type (?:==|in) (\[[^\]]*\]|\"\w+\")", source)
    assert set(re.findall(r"\w+", " ".join(compared))) == set(LOSS_TYPES_OF_TRL)
