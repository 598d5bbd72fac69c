"""Mixtures that the plug-in rejects before vLLM loads any weights."""

import json
import os
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import torch
from transformers import LlamaConfig, MambaConfig, Qwen2Config
from vllm import EngineArgs

from logitmix.mixture.configuration import FORMAT_VERSION, NO_ADAPTER, LogitMixConfig
from logitmix.serving import config
from logitmix.serving.config import engine_class, validate_members, validate_speculation
from tests.helpers.engines import engine
from tests.helpers.vllm_members import build_mixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixture")
    build_mixture("qwen2", "llama", alpha=0.4).save_pretrained(path)
    return path


def copy_with_config(folder, path, **values):
    """Copy a checkpoint with changes to its configuration; return the copy's folder."""
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    changed = json.loads((folder / "config.json").read_text()) | values
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(changed))
    return str(path)


def test_pipeline_parallelism_is_rejected(folder):
    with pytest.raises(
        ValueError, match="pipeline_parallel_size is 2, but must be 1 for a mixture; use tensor_parallel_size"
    ):
        EngineArgs(model=str(folder), pipeline_parallel_size=2).create_engine_config()


def test_other_methods_of_speculative_decoding_are_rejected(folder):
    speculative = {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    message = "the speculative method 'ngram_gpu' is not supported for a mixture; use one of draft_model, ngram"
    with pytest.raises(ValueError, match=message):
        EngineArgs(model=str(folder), speculative_config=speculative).create_engine_config()


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp", "medusa"])
def test_drafts_from_the_targets_hidden_states_are_rejected(method):
    target = SimpleNamespace(
        hf_config=LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig()]), model="mixture"
    )
    speculative = SimpleNamespace(method=method, model="draft", target_model_config=target)
    with pytest.raises(ValueError, match=f"the speculative method '{method}' is not supported for a mixture; use one"):
        validate_speculation(SimpleNamespace(model_config=target, speculative_config=speculative))


@pytest.mark.runners
def test_the_mixture_follows_the_runner_that_vllm_chooses(folder):
    before = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    vllm_config = EngineArgs(model=str(folder)).create_engine_config()
    chosen = engine_class(vllm_config)
    assert chosen.__name__ == ("SecondRunnerEngine" if vllm_config.use_v2_model_runner else "FirstRunnerEngine")
    assert issubclass(vllm_config.model_config.logits_processors[-1], chosen.request_validator)
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == before
    assert vllm_config.model_config.dtype == torch.bfloat16  # for float32 weights, unless the engine is told otherwise


def test_splits_of_a_batch_are_rejected_on_the_second_runner(folder, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    message = "prefill_context_parallel_size is 2, but must be 1 for a mixture; use tensor_parallel_size"
    with pytest.raises(ValueError, match=message):
        EngineArgs(model=str(folder), prefill_context_parallel_size=2).create_engine_config()


@pytest.mark.parametrize("second", ["0", "1"])
def test_two_batches_at_once_are_rejected(folder, monkeypatch, second):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", second)
    with pytest.raises(ValueError, match="enable_dbo is set, but a mixture cannot run two batches at once"):
        EngineArgs(model=str(folder), enable_dbo=True).create_engine_config()


def test_a_second_runner_that_cannot_validate_requests_is_rejected(folder, monkeypatch):
    """As in vLLM before 0.31, which takes its first runner unless the environment demands the second."""
    monkeypatch.setattr(config, "second_model_runner_validates_requests", lambda: False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match=r"only in vLLM 0\.31 or later; unset it, or install a later vLLM"):
        EngineArgs(model=str(folder)).create_engine_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hf_overrides": {"alpha": 0.3}}, "hf_overrides sets alpha to 0.3, .* set weights"),
        ({"hf_overrides": {"weights": [0.5, 0.3, 0.2]}}, "2 members"),
        ({"hf_overrides": {"scheme": "linear"}}, "scheme is 'linear'"),
        ({"hf_overrides": {"scheme": "prob", "weights": [1.5, -0.5]}}, "scheme 'prob' needs weights >= 0"),
        ({"hf_overrides": {"plausibility": 2.0}}, "plausibility is 2.0"),
        ({"hf_overrides": {"alpha_range": [1, 0]}}, r"alpha_range is \[1, 0\], but must be two numbers"),
        ({"runner": "pooling"}, "the runner is 'pooling', but a mixture has no hidden states to pool"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds is set, but each member of a mixture embeds tokens"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_configuration_that_a_mixture_cannot_have_is_rejected(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        EngineArgs(model=str(folder), **arguments).create_engine_config()


def test_members_without_attention_are_rejected():
    mambas = LogitMixConfig.from_member_configs([MambaConfig(num_hidden_layers=1), MambaConfig(num_hidden_layers=1)])
    with pytest.raises(ValueError, match="the member policy is a mamba with layers other than attention"):
        validate_members(mambas)


def test_an_architecture_that_vllm_does_not_support_is_rejected():
    unknown = LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig(architectures=["LlamaForNobody"])])
    with pytest.raises(
        ValueError, match="the member anchor_0 is a LlamaForNobody, which this version of vLLM does not support"
    ):
        validate_members(unknown)


def test_a_mixture_with_a_prompt_of_its_own_is_rejected(folder, tmp_path):
    path = copy_with_config(folder, tmp_path, member_prompts={"anchor_0": [3, 4]})
    with pytest.raises(ValueError, match="vLLM gives all members the same tokens, but the mixture has a prompt"):
        validate_members(LogitMixConfig.from_pretrained(path))


def test_a_checkpoint_with_a_later_format_version_is_rejected(folder, tmp_path):
    path = copy_with_config(folder, tmp_path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match=f"format version {FORMAT_VERSION + 1}.*install a newer logitmix"):
        EngineArgs(model=path).create_engine_config()


def test_a_context_that_does_not_fit_in_memory_is_rejected(folder, tmp_path):
    """vLLM's error names the bytes of the context, and the longest that fits; ours also those of a token."""
    members = json.loads((folder / "config.json").read_text())
    longer = {name: members[name] | {"max_position_embeddings": 1 << 22} for name in ("policy", "anchor_0")}
    path = copy_with_config(folder, tmp_path, **longer)
    # the policy has 2 layers of 2 heads of size 32, the anchor 3 of 1; keys and values in float32
    token_bytes = (2 * 2 + 3 * 1) * 32 * 2 * 4
    assert token_bytes * (1 << 22) == 7 << 30
    needed = r"\(4194304\), \(7\.0 GiB KV.*estimated maximum model length is \d+"
    of_a_token = f"A token of context takes {token_bytes} bytes of KV cache on a device, of all members"
    with (
        pytest.raises(ValueError, match=f"{needed}.*{of_a_token}"),
        engine(path, max_model_len=1 << 22, num_gpu_blocks_override=None),
    ):
        pass


def test_members_that_differ_in_their_prompts_alone_are_rejected():
    members = [Qwen2Config(), Qwen2Config()]
    with pytest.raises(ValueError, match="policy and anchor_0 are one model and differ only in their"):
        validate_members(LogitMixConfig.from_member_configs(members, adapters={"anchor_0": NO_ADAPTER}))
