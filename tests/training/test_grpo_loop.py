"""The oracle, `examples/grpo_loop.py`, against numbers computed by hand and known limits.

Shape legend: B sequences, T time, V vocabulary, Q questions, G rollouts a question.
"""

import importlib.util
import math
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from tests.helpers.paths import ROOT

SOURCE = ROOT / "examples" / "grpo_loop.py"
V, EOS, PAD = 13, 1, 0


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_loop", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fixed(nn.Module):
    """A model whose logits do not depend on its input."""

    def __init__(self, logits_BTV: Tensor) -> None:
        super().__init__()
        self.logits_BTV = nn.Parameter(logits_BTV)

    def forward(self, input_ids: Tensor, **kwargs) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits_BTV[:, -input_ids.shape[1] :], past_key_values=None)


def tiny_pair() -> tuple[Qwen2ForCausalLM, GPT2LMHeadModel]:
    """A policy and an anchor of different depth, width and architecture, with different distributions."""
    torch.manual_seed(0)
    policy = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    )
    # positions by a table: unlike rotary ones, they notice when padding shifts them
    anchor = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_embd=24,
            n_layer=2,
            n_head=2,
            n_positions=32,
            initializer_range=0.3,
        )
    )
    return policy.eval(), anchor.eval().requires_grad_(False)


PROMPTS = [[5, 6, 7, 8], [9, 4], [3]]
PROMPT_IDS_BT = torch.tensor([[PAD] * (4 - len(row)) + row for row in PROMPTS])
PROMPT_MASK_BT = torch.tensor([[0] * (4 - len(row)) + [1] * len(row) for row in PROMPTS])


# --- eq. 1 and 3 -------------------------------------------------------------------------------------------------


def test_mix(loop):
    policy, anchor = torch.randn(2, 3, V), torch.randn(2, 3, V)
    torch.testing.assert_close(loop.mix(policy, anchor, 0.3), 0.7 * policy + 0.3 * anchor)
    assert torch.equal(loop.mix(policy, anchor, 0.0), policy)
    assert torch.equal(loop.mix(policy, anchor, 1.0), anchor)
    assert loop.mix(policy.bfloat16(), anchor.bfloat16(), 0.3).dtype == torch.float32
    assert loop.mix(policy.double(), anchor.double(), 0.3).dtype == torch.float64


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.4, 0.7), (1.0, 1.3)])
def test_sampling_equals_a_loop_without_caches_and_without_padding(loop, alpha, temperature):
    """Row by row, on the unpadded prompt and the tokens sampled so far; the seed repeats the draws of a batch."""
    policy, anchor = tiny_pair()
    completion_BT, mask_BT = loop.sample(
        policy, anchor, PROMPT_IDS_BT, PROMPT_MASK_BT, alpha, temperature, 12, EOS, PAD, torch.manual_seed(3)
    )
    generator = torch.Generator().manual_seed(3)
    rows, alive = [list(row) for row in PROMPTS], [True] * 3
    with torch.no_grad():
        for t in range(completion_BT.shape[1]):
            mixed_BV = torch.stack(
                [
                    (1 - alpha) * policy(torch.tensor([row])).logits[0, -1]
                    + alpha * anchor(torch.tensor([row])).logits[0, -1]
                    for row in rows
                ]
            )
            drawn_B = torch.multinomial((mixed_BV / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
            for b in range(3):
                assert mask_BT[b, t] == alive[b]
                if alive[b]:
                    assert completion_BT[b, t] == drawn_B[b]
                    rows[b].append(drawn_B[b])
                    alive[b] = drawn_B[b] != EOS
                else:
                    assert completion_BT[b, t] == PAD
    assert completion_BT.shape[1] == 12 or not any(alive)


def test_sampling_follows_the_mixture(loop):
    """Frequencies over many rows; the policy, the anchor, or no temperature would give other ones."""
    B = 20_000
    policy_V, anchor_V = torch.tensor([2.0, 0.0, -1.0, 0.5]), torch.tensor([-1.0, 1.5, 0.0, 0.5])
    policy, anchor = (Fixed(z_V.expand(B, 1, 4).clone()) for z_V in (policy_V, anchor_V))
    prompt_BT = torch.ones(B, 1, dtype=torch.long)
    token_BT, _ = loop.sample(policy, anchor, prompt_BT, prompt_BT, 0.4, 0.8, 1, EOS, PAD, torch.manual_seed(0))
    frequencies_V = torch.bincount(token_BT[:, 0], minlength=4) / B
    expected_V = ((0.6 * policy_V + 0.4 * anchor_V) / 0.8).softmax(-1)
    torch.testing.assert_close(frequencies_V, expected_V, rtol=0, atol=0.015)


def test_a_completion_ends_with_eos_and_sampling_stops_when_all_have(loop):
    always_eos = Fixed(torch.nn.functional.one_hot(torch.full((3, 4), EOS), V) * 1e4)
    completion_BT, mask_BT = loop.sample(always_eos, always_eos, PROMPT_IDS_BT, PROMPT_MASK_BT, 0.5, 1.0, 12, EOS, PAD)
    assert completion_BT.tolist() == [[EOS]] * 3
    assert mask_BT.tolist() == [[1]] * 3


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.4, 0.7), (1.0, 1.3)])
def test_scores_are_those_of_the_distribution_sampled_from(loop, alpha, temperature):
    """The contract: log-probs of a padded batch equal the plain computation on each row without any padding."""
    policy, anchor = tiny_pair()
    completion_BT, mask_BT = loop.sample(
        policy, anchor, PROMPT_IDS_BT, PROMPT_MASK_BT, alpha, temperature, 12, EOS, PAD, torch.manual_seed(3)
    )
    C = completion_BT.shape[1]
    log_probs_BT = loop.token_log_probs(
        policy,
        anchor,
        torch.cat([PROMPT_IDS_BT, completion_BT], 1),
        torch.cat([PROMPT_MASK_BT, mask_BT], 1),
        C,
        alpha,
        temperature,
    )
    assert log_probs_BT.shape == (3, C)
    for b, prompt in enumerate(PROMPTS):
        completion = completion_BT[b][mask_BT[b].bool()].tolist()
        row_BT = torch.tensor([prompt + completion])
        mixed_TV = ((1 - alpha) * policy(row_BT).logits + alpha * anchor(row_BT).logits)[0] / temperature
        expected_T = mixed_TV.log_softmax(-1)[range(len(prompt) - 1, row_BT.shape[1] - 1), completion]
        torch.testing.assert_close(log_probs_BT[b, : len(completion)], expected_T, rtol=1e-5, atol=1e-5)


# --- eq. 4 -------------------------------------------------------------------------------------------------------


def test_advantages_by_hand(loop):
    rewards_QG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    # unbiased: squared deviations 3/4 and 1, over G - 1 = 3
    expected_QG = torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.5 * math.sqrt(3)] * 2 + [-0.5 * math.sqrt(3)] * 2])
    torch.testing.assert_close(loop.advantages(rewards_QG, eps=0.0), expected_QG.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loop.advantages(rewards_QG[:1], eps=0.5)[0, 0].item(), 0.75)


@pytest.mark.parametrize("rewards", [[[1.0] * 4], [[0.0] * 4], [[1.0]], [[0.1] * 3]])
def test_equal_rewards_have_no_advantage(loop, rewards):
    advantages_QG = loop.advantages(torch.tensor(rewards))
    assert advantages_QG.abs().max() < 0.02  # 0.1 three times: the mean is not 0.1 in the last bit
    assert torch.isfinite(advantages_QG).all()


# --- eq. 6 -------------------------------------------------------------------------------------------------------


def by_ratio(*rows: list[float]) -> tuple[Tensor, Tensor]:
    """Log-probs and old log-probs that have these ratios."""
    old_BT = torch.full((len(rows), len(rows[0])), -1.5, dtype=torch.float64)
    return (old_BT + torch.tensor(rows, dtype=torch.float64).log()).requires_grad_(), old_BT


def test_loss_by_hand_clips_on_both_sides(loop):
    """Four ratios below, inside and above [0.8, 1.2], for an advantage of each sign.

    A = +2: min(ρA, clip(ρ)A) = 1.0, 1.8, 2.2, 2.4 (1.5 clipped to 1.2);  sum 7.4, gradient ρA where not clipped
    A = -1: min(ρA, clip(ρ)A) = -0.8 (0.5 clipped to 0.8), -0.9, -1.1, -1.5;  sum -4.3
    """
    ratios = [0.5, 0.9, 1.1, 1.5]
    log_probs_BT, old_BT = by_ratio(ratios, ratios)
    loss = loop.group_loss(log_probs_BT, old_BT, torch.tensor([[2.0, -1.0]]), torch.ones(2, 4), clip=0.2)
    assert loss.item() == pytest.approx(-(7.4 - 4.3) / 8)
    loss.backward()
    expected_BT = -torch.tensor([[1.0, 1.8, 2.2, 0.0], [0.0, -0.9, -1.1, -1.5]], dtype=torch.float64) / 8
    torch.testing.assert_close(log_probs_BT.grad, expected_BT)


def test_the_normaliser_is_the_questions_own(loop):
    """Question 1 has 1 + 3 tokens, question 2 has 3 + 3: neither a mean over tokens nor over rollouts gives this."""
    log_probs_BT, old_BT = by_ratio(*[[1.0, 1.0, 1.0]] * 4)
    mask_BT = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    advantages_QG = torch.tensor([[1.0, -1.0], [0.5, 1.0]], dtype=torch.float64)
    loss = loop.group_loss(log_probs_BT, old_BT, advantages_QG, mask_BT)
    per_question = -((1 - 3) / 4 + (1.5 + 3) / 6) / 2
    over_tokens = -((1 - 3) + (1.5 + 3)) / 10
    over_rollouts = -(1 - 1 + 0.5 + 1) / 4
    assert loss.item() == pytest.approx(per_question)
    assert len({per_question, over_tokens, over_rollouts}) == 3


def test_equal_lengths_make_it_the_mean_over_tokens(loop):
    torch.manual_seed(0)
    log_probs_BT = torch.randn(6, 5, dtype=torch.float64)
    advantages_QG = torch.randn(2, 3, dtype=torch.float64)
    loss = loop.group_loss(log_probs_BT, log_probs_BT, advantages_QG, torch.ones(6, 5))
    torch.testing.assert_close(loss, -advantages_QG.mean())


def test_one_question_on_its_own_is_its_share_of_the_mean(loop):
    torch.manual_seed(0)
    log_probs_BT, old_BT = torch.randn(2, 6, 5, dtype=torch.float64)
    mask_BT = (torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 5])[:, None]).long()
    advantages_QG = torch.randn(2, 3, dtype=torch.float64)
    whole = loop.group_loss(log_probs_BT, old_BT, advantages_QG, mask_BT)
    parts = [
        loop.group_loss(log_probs_BT[rows], old_BT[rows], advantages_QG[q : q + 1], mask_BT[rows])
        for q, rows in enumerate((slice(0, 3), slice(3, 6)))
    ]
    torch.testing.assert_close(whole, sum(parts) / 2)


def test_a_group_of_equal_rewards_moves_nothing(loop):
    log_probs_BT, old_BT = by_ratio([0.5, 1.5], [1.0, 1.1])
    loss = loop.group_loss(log_probs_BT, old_BT, loop.advantages(torch.ones(1, 2)), torch.ones(2, 2))
    loss.backward()
    assert loss.item() == 0
    assert (log_probs_BT.grad == 0).all()


def test_a_question_without_tokens_contributes_0(loop):
    log_probs_BT, old_BT = by_ratio(*[[1.0, 1.1]] * 4)
    mask_BT = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 0]])
    advantages_QG = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    loss = loop.group_loss(log_probs_BT, old_BT, advantages_QG, mask_BT)
    loss.backward()
    assert loss.item() == pytest.approx(-((1.0 + 1.1 - 1.0) / 3) / 2)
    assert (log_probs_BT.grad[mask_BT == 0] == 0).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_stands_in_the_padding_does_not_matter(loop, bad):
    log_probs_BT, old_BT = by_ratio([1.1, 1.0], [0.9, 1.0])
    with torch.no_grad():
        log_probs_BT[:, 1] = bad
    loss = loop.group_loss(log_probs_BT, old_BT, torch.tensor([[1.0, -1.0]]), torch.tensor([[1, 0], [1, 0]]))
    loss.backward()
    assert loss.item() == pytest.approx(-(1.1 - 0.9) / 2)
    assert (log_probs_BT.grad[:, 1] == 0).all()


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.4, 0.7), (0.9, 1.3)])
def test_gradient_of_the_policys_logits_in_closed_form(loop, alpha, temperature):
    """-A ρ (1-α) (onehot(y) - softmax(z_mix / T)) / T / N at each unclipped token, N = Q × its question's tokens."""
    torch.manual_seed(0)
    Q, G, P, C = 2, 2, 2, 3
    B = Q * G
    policy, anchor = (Fixed(torch.randn(B, P + C, V, dtype=torch.float64)) for _ in range(2))
    input_ids_BT = torch.randint(V, (B, P + C))
    mask_BT = (torch.arange(C) < torch.tensor([3, 1, 2, 0])[:, None]).long()
    attention_mask_BT = torch.cat([torch.ones(B, P, dtype=torch.long), mask_BT], 1)
    advantages_QG = torch.randn(Q, G, dtype=torch.float64)
    log_probs_BT = loop.token_log_probs(policy, anchor, input_ids_BT, attention_mask_BT, C, alpha, temperature)
    old_BT = log_probs_BT.detach() - torch.linspace(-0.1, 0.1, B * C, dtype=torch.float64).view(B, C)
    loop.group_loss(log_probs_BT, old_BT, advantages_QG, mask_BT).backward()

    z_mix_BTV = ((1 - alpha) * policy.logits_BTV + alpha * anchor.logits_BTV).detach()[:, P - 1 : -1]
    one_hot_BTV = torch.nn.functional.one_hot(input_ids_BT[:, P:], V)
    ratio_BT = (log_probs_BT.detach() - old_BT).exp()
    tokens_Q = mask_BT.view(Q, -1).sum(-1)
    weight_BT = advantages_QG.view(B, 1) * ratio_BT * mask_BT / (Q * tokens_Q.repeat_interleave(G)).view(B, 1)
    expected_BTV = torch.zeros(B, P + C, V, dtype=torch.float64)
    expected_BTV[:, P - 1 : -1] = (
        -weight_BT[..., None] * (1 - alpha) * (one_hot_BTV - (z_mix_BTV / temperature).softmax(-1)) / temperature
    )
    torch.testing.assert_close(policy.logits_BTV.grad, expected_BTV, rtol=1e-10, atol=1e-13)
    assert anchor.logits_BTV.grad is None


# --- the script --------------------------------------------------------------------------------------------------


def test_it_stands_on_its_own():
    source = SOURCE.read_text()
    assert len(source.splitlines()) < 300
    imported = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert [line for line in imported if "logitmix" in line] == ["from logitmix.tasks import Arithmetic"]
    assert not any("trl" in line for line in imported)


def test_characters_round_trip_and_pad(loop):
    task = loop.Arithmetic()
    for row in [*task.base_corpus(50), *task.demonstrations(50)]:
        for text in row.values():
            ids = loop.encode(text)
            assert min(ids) >= 2
            assert loop.decode(torch.tensor([loop.PAD, *ids, loop.EOS, loop.PAD])) == text
    ids_BT, mask_BT = loop.encode_prompts(["1+2=?\n", "10+2=?\n"])
    assert mask_BT.tolist() == [[0] + [1] * 6, [1] * 7]
    assert ids_BT[0, 0] == loop.PAD


def test_main_runs(loop, capsys):
    small = "--steps 2 --questions 2 --group 2 --pretrain-steps 2 --sft-steps 2 --max-new-tokens 8 --seed 1"
    history = loop.main(small.split())
    assert len(history) == 2
    for metrics in history:
        assert set(metrics) == {"reward", "format", "loss"}
        assert all(math.isfinite(value) for value in metrics.values())
    printed = capsys.readouterr().out
    assert "step   2  reward" in printed
    assert loop.main(small.split()) == history, "the same seed gives the same run"
