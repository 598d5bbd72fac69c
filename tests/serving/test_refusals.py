"""What the plug-in refuses, before a weight is loaded, in one sentence that says why."""

import json

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

from transformers import LlamaConfig, MambaConfig, Qwen2Config
from vllm import EngineArgs

from logitmix.mixture.configuration import FORMAT_VERSION, LogitMixConfig
from logitmix.serving import model
from logitmix.serving.config import validate_members
from logitmix.serving.request_weights import parse_request_weights
from tests.helpers.engines import engine, mixture_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixture")
    mixture_of("qwen2", "llama", alpha=0.4).save_pretrained(path)
    return path


def change_config(folder, path, **values):
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | values
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_pipeline_parallelism(folder):
    with pytest.raises(ValueError, match="pipeline_parallel_size is 2; a mixture needs 1, use tensor_parallel_size"):
        EngineArgs(model=str(folder), pipeline_parallel_size=2).create_engine_config()


def test_speculative_decoding(folder):
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(ValueError, match="speculative decoding cannot be used with a mixture"):
        EngineArgs(model=str(folder), speculative_config=speculative).create_engine_config()


def test_vllms_second_model_runner(folder, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match=r"VLLM_USE_V2_MODEL_RUNNER is '1'.*set it to 0"):
        EngineArgs(model=str(folder)).create_engine_config()


def test_members_without_attention():
    config = LogitMixConfig.from_member_configs([MambaConfig(num_hidden_layers=1), MambaConfig(num_hidden_layers=1)])
    with pytest.raises(ValueError, match="the member policy is a mamba with layers other than attention"):
        validate_members(config)


def test_an_architecture_that_vllm_lacks():
    config = LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig(architectures=["LlamaForNobody"])])
    with pytest.raises(
        ValueError, match="the member anchor_0 is a LlamaForNobody, which this version of vLLM does not support"
    ):
        validate_members(config)


def test_a_checkpoint_of_a_later_format(folder, tmp_path):
    path = change_config(folder, tmp_path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match=f"format version {FORMAT_VERSION + 1}.*install a newer logitmix"):
        EngineArgs(model=path).create_engine_config()


def test_too_little_memory_for_the_context(folder, tmp_path, monkeypatch):
    """The log says what a token costs, vLLM's own sentence what the context does and the longest that fits."""
    members = json.loads((folder / "config.json").read_text())
    longer = {name: members[name] | {"max_position_embeddings": 1 << 22} for name in ("policy", "anchor_0")}
    path = change_config(folder, tmp_path, **longer)
    # 2 layers of 2 heads of 32 and 3 of 1: keys and values in float32
    a_token = (2 * 2 + 3 * 1) * 32 * 2 * 4
    assert a_token * (1 << 22) == 7 << 30
    logged = []
    monkeypatch.setattr(model.logger, "info", lambda message, *values: logged.append(message % values))
    with (
        pytest.raises(ValueError, match=r"\(4194304\), \(7\.0 GiB KV.*estimated maximum model length is \d+"),
        engine(path, max_model_len=1 << 22),
    ):
        pass
    assert logged == [f"A token of context takes {a_token} bytes of KV cache, of all members."]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"alpha": 0.3, "member": "policy"}, "pass one of alpha, member, not 2"),
        ({"alpha": "much"}, "alpha is 'much', but must be a number"),
        ({"alpha": 10**400}, "but must be a number"),
        ({"alpha": 1.5}, r"alpha is 1\.5, but this server takes 0\.0 to 1\.0"),
        ({"weights": 0.5}, "weights is 0.5, but must be a list of numbers"),
        ({"alpha": {"anchor": 0.3}}, "alpha is {'anchor': 0.3}, but must be a number"),
        ({"weights": [[-5, 6]]}, r"weights is \[\[-5, 6\]\], but must be a list of numbers"),
        ({"weights": [None, 1]}, r"weights is \[None, 1\], but must be a list of numbers"),
        ({"weights": [0.5, 0.3, 0.2]}, "2 members"),
        ({"weights": [1.5, -0.5]}, r"alpha is -0\.5, but this server takes 0\.0 to 1\.0"),
        ({"member": "teacher"}, "there is no member 'teacher'; the members are policy, anchor_0"),
    ],
)
def test_requests(asked, sentence):
    config = LogitMixConfig.from_member_configs([Qwen2Config(), LlamaConfig()], alpha_range=[0.0, 1.0])
    with pytest.raises(ValueError, match=sentence):
        parse_request_weights(config, asked)
