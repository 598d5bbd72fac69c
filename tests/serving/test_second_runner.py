"""Parts of the second model runner's side: mixing on the device, and the state of requests in their slots."""

import pickle
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import torch
from transformers import LlamaConfig, Qwen2Config
from vllm import SamplingParams

from logitmix.mixture.configuration import LogitMixConfig
from logitmix.mixture.mixing import Plausibility, mix_logits
from logitmix.serving import engine_v1, engine_v2
from logitmix.serving.engine_v2 import from_columns, mix_rows, to_columns
from tests.helpers.engines import engine, model_runner
from tests.helpers.vllm_members import build_mixture

pytestmark = pytest.mark.runners
INF = float("inf")
WEIGHTS = {
    "logit": [[0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.5, -0.5, 0.0], [-0.2, 0.7, 0.5], [0.3, 0.3, 0.4]],
    "prob": [[0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]],
}


def logits_of(rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(rows, 17, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("scheme", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixing_on_the_device_matches_mix_logits(scheme, dtype):
    weights = torch.tensor(WEIGHTS[scheme])
    logits = logits_of(len(weights), dtype)
    torch.testing.assert_close(mix_rows(logits, weights, scheme), mix_logits(logits, weights, scheme))


@pytest.mark.parametrize("scheme", WEIGHTS)
def test_mixing_on_the_device_ignores_and_rules_out_infinite_logits_as_mix_logits_does(scheme):
    weights = torch.tensor(WEIGHTS[scheme])
    logits = logits_of(len(weights))
    logits[0][:, 0] = -INF
    logits[1][:, :2] = -INF
    logits[2][:, 3] = -INF
    logits[2][1:3, 4] = INF if scheme == "logit" else -INF
    torch.testing.assert_close(mix_rows(logits, weights, scheme), mix_logits(logits, weights, scheme))


@pytest.mark.parametrize("scheme", WEIGHTS)
def test_mixing_on_the_device_cuts_as_mix_logits_does(scheme):
    weights, cut = torch.tensor(WEIGHTS[scheme]), Plausibility(0.3, 1)
    mixed = mix_logits(logits := logits_of(len(weights)), weights, scheme, cut)
    assert torch.isneginf(mixed).any()
    torch.testing.assert_close(mix_rows(logits, weights, scheme, cut=cut), mixed)


@pytest.mark.parametrize("scheme", WEIGHTS)
def test_weights_above_zero_need_no_masks(scheme):
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    logits = logits_of(2)
    logits[1][:, 5] = -INF
    expected = mix_logits(logits, weights, scheme)
    torch.testing.assert_close(mix_rows(logits, weights, scheme, has_special_weights=False), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_members", [2, 3, 5])
def test_weights_pass_through_hidden_states_bit_for_bit(dtype, num_members):
    weights = torch.rand(300, num_members, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    weights[0] = torch.tensor([1e-30] * num_members)
    columns = to_columns(weights, dtype)
    assert columns.dtype == dtype
    assert columns.shape[1] * columns.element_size() % 16 == 0
    hidden = torch.cat([torch.zeros(300, 64, dtype=dtype), columns], dim=-1)
    rows = torch.tensor([299, 0, 7])
    assert torch.equal(from_columns(hidden[rows][:, 64:], num_members), weights[rows])


def config_of(num_members=2):
    members = [Qwen2Config(), *[LlamaConfig()] * (num_members - 1)]
    return LogitMixConfig.from_member_configs(members, weights=[1 / num_members] * num_members)


@pytest.mark.parametrize("processor", [engine_v1.RequestFields, engine_v2.RequestFields], ids=["first", "second"])
def test_requests_to_two_mixtures_in_one_process_are_validated_by_their_own(processor):
    two, three = processor.of(config_of(2)), processor.of(config_of(3))
    request = SamplingParams(extra_args={"weights": [0.2, 0.3, 0.5]})
    three.validate_params(request)
    with pytest.raises(ValueError, match="2 members"):
        two.validate_params(request)
    assert issubclass(two, processor)


@pytest.mark.parametrize("processor", [engine_v1.RequestFields, engine_v2.RequestFields], ids=["first", "second"])
def test_a_validator_reaches_other_processes(processor):
    config = config_of()
    config.alpha_range = [0.0, 1.0]
    copy = pickle.loads(pickle.dumps(processor.of(config)))
    assert issubclass(copy, processor)
    with pytest.raises(ValueError, match=r"alpha is 2\.0, but this server takes"):
        copy.validate_params(SamplingParams(extra_args={"alpha": 2.0}))
    assert pickle.loads(pickle.dumps(processor)) is processor


@pytest.fixture(scope="module")
def engine_state(tmp_path_factory):
    """The state of the requests of an engine with a mixture of alpha 0.25, which has no request yet."""
    folder = tmp_path_factory.mktemp("mixture")
    build_mixture("qwen2", "llama", alpha=0.25).save_pretrained(folder)
    with engine(folder, max_num_seqs=4) as llm:
        if not llm.llm_engine.vllm_config.use_v2_model_runner:
            pytest.skip("vLLM uses its first model runner; VLLM_USE_V2_MODEL_RUNNER=1 chooses the second")
        yield model_runner(llm).model_state


@pytest.fixture
def state(engine_state):
    yield engine_state
    for request_id in ("a", "b", "c"):
        engine_state.remove_request(request_id)


def add(state, slot, request_id, **fields):
    state.add_request(slot, SimpleNamespace(req_id=request_id, sampling_params=SamplingParams(extra_args=fields)))
    state.apply_staged_writes()


def weights_of_tokens(state, slots, lengths, padded=0):
    """The anchor's weight of each token of a step of requests in these slots, of so many tokens each."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    batch = SimpleNamespace(
        num_tokens_after_padding=sum(lengths) + padded, query_start_loc=starts, num_reqs=len(slots),
        idx_mapping=torch.tensor(slots),
    )  # fmt: skip
    weights = state.prepare_inputs(batch, None)["request_weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    return [round(weight, 3) for weight in weights[:, 1].tolist()]


def test_each_token_has_the_weights_of_its_request(state):
    add(state, 2, "a", alpha=0.9)
    add(state, 0, "b")
    add(state, 3, "c", weights=[0.4, 0.6])
    assert weights_of_tokens(state, [0, 3, 2], [2, 3, 1]) == [0.25, 0.25, 0.6, 0.6, 0.6, 0.9]
    assert weights_of_tokens(state, [2, 0], [1, 1]) == [0.9, 0.25]


def test_padding_and_dummy_runs_read_the_same_address(state):
    """A CUDA graph replays what it captured at one address."""
    add(state, 1, "a", alpha=0.5)
    assert weights_of_tokens(state, [1], [3], padded=5) == [0.5] * 8
    captured = state.prepare_dummy_inputs(1, 8)["request_weights"]
    add(state, 1, "b", alpha=0.75)
    weights_of_tokens(state, [1], [3], padded=5)
    assert captured[:, 1].tolist() == [0.75] * 8


def test_a_slot_forgets_the_request_before(state):
    add(state, 1, "a", alpha=0.9)
    state.remove_request("a")
    add(state, 1, "b")
    assert weights_of_tokens(state, [1], [2]) == [0.25, 0.25]


def test_masks_are_used_while_a_request_with_a_weight_of_zero_or_below_runs(state):
    add(state, 0, "a", alpha=0.5)
    weights_of_tokens(state, [0], [1])
    assert state.engine.has_special_weights is False
    add(state, 1, "b", member="policy")
    weights_of_tokens(state, [0, 1], [1, 1])
    assert state.engine.has_special_weights is True
    state.remove_request("b")
    weights_of_tokens(state, [0], [1])
    assert state.engine.has_special_weights is False
