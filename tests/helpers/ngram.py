"""A mixture of adapters with ngram drafts, checked in a process of its own."""

from logitmix.mixture.modeling import LogitMixForCausalLM
from tests.helpers.adapters import save_adapter
from tests.helpers.engines import assert_matches_transformers, engine
from tests.helpers.vllm_members import save_member

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
PROMPTS = [ids * 4 for ids in ([5, 6, 7], [9, 10], [11, 12, 13, 14], [8])]


def check_ngram_drafts(path):
    """Requests of their own alpha have transformers' greedy tokens and log-probabilities, and drafts were verified."""
    base = save_member(path / "base")
    policy, anchor = save_adapter(path / "policy", base, 1), save_adapter(path / "anchor", base, 2, r=6)
    mixture = LogitMixForCausalLM.from_members(policy, anchor, alpha=0.4, dtype="float32")
    mixture.save_pretrained(path / "mixture")
    with engine(path / "mixture", speculative_config=NGRAM, disable_log_stats=False) as llm:
        assert_matches_transformers(mixture, llm, PROMPTS, max_tokens=24)
        drafted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_draft_tokens")
    assert drafted > 0
