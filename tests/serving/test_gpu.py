"""What only a GPU can show: CUDA graphs, bfloat16, and that no step waits for the device. Skipped without one.

`python -m pytest tests/serving -m gpu` runs on the model runner that vLLM chooses; with VLLM_USE_V2_MODEL_RUNNER=0, on
its first.
"""

from itertools import takewhile

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-serving` has an environment with it")

import torch

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.serving.alternating import alternating_decoding, decoding_statistics
from logitmix.serving.engine_v2 import from_columns, mix_rows, to_columns
from tests.helpers.adapters import save_adapter
from tests.helpers.engines import ALPHAS, PROMPTS, assert_matches_transformers, engine, generate, greedy_params
from tests.helpers.vllm_members import build_mixture, save_member

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU; the tests need CUDA graphs"),
]
MEMORY = {"gpu_memory_utilization": 0.2}
BF16_TOLERANCE = 0.1  # nats: graphs and padding change the order of sums, and bfloat16 has 8 bits


def save_kind(path, kind):
    """Save a mixture of two full members, or of two adapters on one base; return its folder."""
    if kind == "two members":
        build_mixture("qwen2", "llama", alpha=0.4).save_pretrained(path / "mixture")
    else:
        base = save_member(path / "base")
        policy, anchor = save_adapter(path / "policy", base, 1), save_adapter(path / "anchor", base, 2, r=6)
        mixture = LogitMixForCausalLM.from_members(policy, anchor, alpha=0.4, dtype="float32")
        mixture.save_pretrained(path / "mixture")
    return path / "mixture"


def test_float32_matches_transformers_in_cuda_graphs(tmp_path):
    mixture = build_mixture("qwen2", "llama", alpha=0.4)
    mixture.save_pretrained(tmp_path)
    with engine(tmp_path, enforce_eager=False, **MEMORY) as llm:
        assert_matches_transformers(mixture, llm)
        assert_matches_transformers(mixture, llm, prompt_logprobs=0)


@pytest.mark.parametrize("kind", ["two members", "two adapters"])
def test_requests_keep_their_weights_when_cuda_graphs_replay_in_bfloat16(tmp_path, kind):
    """Batches of several sizes replay graphs that were captured without requests, each at its own alpha."""
    folder = save_kind(tmp_path, kind)
    prompts = [PROMPTS[i % 4] for i in range(7)]
    params = [greedy_params({"alpha": i / 6}, max_tokens=8 + i) for i in range(7)]
    runs = []
    for enforce_eager in (True, False):
        with engine(folder, enforce_eager=enforce_eager, dtype="bfloat16", **MEMORY) as llm:
            runs.append([output.outputs[0] for output in generate(llm, prompts, params)])
    for eager, graphs in zip(*runs, strict=True):
        # a near tie may send the two apart; up to there they scored the same tokens
        same = list(takewhile(lambda pair: pair[0] == pair[1], zip(eager.token_ids, graphs.token_ids, strict=True)))
        for i in range(max(len(same), 1)):
            gap = next(iter(eager.logprobs[i].values())).logprob - next(iter(graphs.logprobs[i].values())).logprob
            assert abs(gap) < BF16_TOLERANCE, (i, eager.token_ids, graphs.token_ids)


def test_one_request_and_a_batch_sample_the_same_in_cuda_graphs(tmp_path):
    """A graph of a whole batch that read another request's weights would change the tokens."""
    build_mixture("qwen2", "llama", alpha=0.4).save_pretrained(tmp_path)
    params = [greedy_params({} if alpha is None else {"alpha": alpha}) for alpha in ALPHAS]
    with engine(tmp_path, enforce_eager=False, **MEMORY) as llm:
        together = generate(llm, PROMPTS, params)
        alone = [generate(llm, [prompt], [p])[0] for prompt, p in zip(PROMPTS, params, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids


def test_a_mixture_that_drafts_for_itself_matches_transformers_in_cuda_graphs(tmp_path):
    """Graphs of the mixture and of its draft share layers, but read their inputs at addresses of their own."""
    mixture = build_mixture("qwen2", "llama", alpha=0.4)
    mixture.save_pretrained(tmp_path)
    speculative = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 2}
    with engine(tmp_path, enforce_eager=False, speculative_config=speculative, **MEMORY) as llm:
        assert_matches_transformers(mixture, llm, max_tokens=30)


def test_members_that_take_turns_match_transformers_in_cuda_graphs(tmp_path):
    mixture = build_mixture("qwen2", "llama", alpha=0.4)
    mixture.save_pretrained(tmp_path)
    with engine(tmp_path, enforce_eager=False, **alternating_decoding(), **MEMORY) as llm:
        assert_matches_transformers(mixture, llm, max_tokens=30)
        assert sum(decoding_statistics(llm).drafted) > 0


@pytest.mark.parametrize("scheme", ["logit", "prob"])
def test_mixing_does_not_wait_for_the_device(scheme):
    weights = torch.rand(4, 2, device="cuda")
    logits = [torch.randn(4, 100, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        passed = from_columns(to_columns(weights, torch.bfloat16), 2)
        mix_rows(logits, passed, scheme)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(passed, weights)
