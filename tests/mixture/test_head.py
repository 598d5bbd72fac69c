"""Inferring the output heads of many architectures, and rejecting those that do not fit."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from logitmix.mixture.head import HeadTransform, infer_head_transform, read_head, run_decoder, run_inside_heads
from tests.helpers.members import tiny_member

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
OLD = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}

# The transform of each architecture, read from its modeling file
CONFIGS = {
    "Qwen2": (SMALL, HeadTransform()),
    "Qwen2 tied": (SMALL | {"tie_word_embeddings": True}, HeadTransform()),
    "Qwen3": (SMALL | {"head_dim": 16}, HeadTransform()),
    "Qwen3Moe": (SMALL | MOE, HeadTransform()),
    "Llama": (SMALL, HeadTransform()),
    "Mistral": (SMALL, HeadTransform()),
    "Olmo2": (SMALL, HeadTransform()),
    "Phi": (SMALL, HeadTransform()),  # its head has a bias
    "Phi3": (SMALL, HeadTransform()),
    "StableLm": (SMALL, HeadTransform()),
    "GPTNeoX": (SMALL, HeadTransform()),
    "GPT2": (OLD, HeadTransform()),
    "GPTJ": (OLD | {"rotary_dim": 8}, HeadTransform()),  # a bias
    "Falcon": (SMALL, HeadTransform()),
    "Bloom": ({"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 2}, HeadTransform()),
    # its head multiplies hidden states projected to the width of the embeddings
    "OPT": (SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16}, HeadTransform()),
    "Gemma": (SMALL | {"head_dim": 16}, HeadTransform()),
    "Gemma2": (SMALL | {"head_dim": 16, "final_logit_softcapping": 30.0}, HeadTransform(softcap=30.0)),
    "Gemma2 uncapped": (SMALL | {"head_dim": 16, "final_logit_softcapping": None}, HeadTransform()),
    "Gemma3Text": (SMALL | {"head_dim": 16, "final_logit_softcapping": 7.5}, HeadTransform(softcap=7.5)),
    "Cohere": (SMALL | {"logit_scale": 0.0625}, HeadTransform(scale=0.0625)),
    "Cohere2": (SMALL | {"logit_scale": 0.3}, HeadTransform(scale=0.3)),
    "Granite": (SMALL | {"logits_scaling": 8.0}, HeadTransform(scale=0.125)),
    "FalconH1": (
        SMALL | {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                 "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
        HeadTransform(scale=0.25),
    ),
    # its configuration has a scale that it does not apply
    "Mpt": ({"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 2, "logit_scale": 0.5}, HeadTransform()),
}  # fmt: skip


def member(name: str, dtype: torch.dtype = torch.float32):
    values, transform = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, name.split()[0] + "Config")(**values)
        return AutoModelForCausalLM.from_config(config, dtype=dtype), transform


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_head_give_the_members_own_logits(name):
    model, transform = member(name)
    assert infer_head_transform(model) == transform
    model.eval()
    ids = torch.arange(1, 13).view(2, 6)
    mask = torch.ones_like(ids)
    own = model(input_ids=ids, attention_mask=mask).logits
    ours = read_head(model, transform).logits(run_decoder(model, input_ids=ids, attention_mask=mask).last_hidden_state)
    torch.testing.assert_close(ours, own.to(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Qwen2", "Gemma2", "Cohere2", "Granite", "Phi"])
def test_a_member_in_bfloat16_and_training_mode_is_not_changed(name):
    model, transform = member(name, torch.bfloat16)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert infer_head_transform(model) == transform
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def assert_rejected(model, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        infer_head_transform(model, "anchor_0")
    assert "the head of anchor_0" in str(error.value)
    assert 'loss_head="reference"' in str(error.value)
    assert not any(module._forward_hooks for module in model.modules())


def with_forward(model, change):
    forward = model.forward

    def changed(**kwargs):
        output = forward(**kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    return model


@pytest.mark.parametrize(
    "change",
    [lambda z: z + 1, lambda z: z**3, lambda z: z.log_softmax(-1), lambda z: z.clamp(max=5), lambda z: z.roll(1, -1)],
    ids=["shift", "power", "softmax", "clamp", "roll"],
)
def test_an_unknown_change_of_the_logits_is_rejected(change):
    assert_rejected(
        with_forward(tiny_member("qwen2"), change), "changes its logits by more than a scale and a soft cap"
    )


def test_logits_of_another_size_are_rejected():
    assert_rejected(
        with_forward(tiny_member("qwen2"), lambda z: z[..., :-1]), "has 61 outputs but it returns 60 logits"
    )


def test_a_head_that_does_more_than_multiply_is_rejected():
    class Doubled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model = tiny_member("qwen2")
    head = Doubled(32, 61, bias=False)
    model.set_output_embeddings(head)
    assert_rejected(model, "its output head, a Doubled, does more than multiply")


def test_a_head_without_a_weight_matrix_is_rejected():
    model = tiny_member("qwen2")
    model.set_output_embeddings(nn.Sequential(nn.Linear(32, 61)))
    assert_rejected(model, "its output head is a Sequential")


def test_an_untrained_adapter_on_the_head_is_rejected():
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_member("qwen2", tie_word_embeddings=False)
    assert_rejected(
        inject_adapter_in_model(LoraConfig(target_modules=["lm_head"]), model), "has a parameter 'base_layer.weight'"
    )


def test_adapters_in_the_layers_are_part_of_the_hidden_states():
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = inject_adapter_in_model(config, tiny_member("qwen2"))
    ids = torch.arange(1, 13).view(2, 6)
    ours = read_head(model, infer_head_transform(model)).logits(run_decoder(model, input_ids=ids).last_hidden_state)
    torch.testing.assert_close(ours, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_a_change_of_the_hidden_states_before_the_head_is_rejected():
    model = tiny_member("qwen2")
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_rejected(model, "changes the hidden states between")


def test_a_head_that_is_not_called_is_rejected():
    model = tiny_member("qwen2")
    model.get_output_embeddings = lambda: nn.Linear(32, 61)
    assert_rejected(model, "does not call its decoder and its output head in the usual way")


def test_a_decoder_without_a_head_is_rejected():
    assert_rejected(transformers.Qwen2Model(tiny_member("qwen2").config), "which has no single weight matrix")


# --- inside the heads' forwards --------------------------------------------------------------------------------------


def test_run_inside_heads_calls_each_head_and_its_hooks_once():
    first, second = nn.Linear(3, 5), nn.Linear(3, 5)
    calls = []
    for name, head in (("first", first), ("second", second)):
        head.register_forward_pre_hook(lambda module, inputs, name=name: calls.append(name) or (*inputs,))
    first.register_forward_pre_hook(lambda module, inputs: tuple(x + 1 for x in inputs))  # as FSDP2 does to inputs
    first.register_forward_hook(lambda module, inputs, outputs: (*outputs, torch.ones(())))
    hidden = [torch.zeros(2, 3), torch.full((2, 3), 5.0), torch.full((2, 3), 7.0)]

    def then(states):
        calls.append("then")
        return tuple(state.mean() for state in states)

    found = run_inside_heads([first, second, first], hidden, then)
    assert [x.item() for x in found] == [1.0, 5.0, 8.0, 1.0]
    assert calls == ["first", "second", "then"]


def test_run_inside_heads_restores_the_heads_after_an_error():
    head = nn.Linear(3, 5)
    own = head.forward = lambda hidden: hidden * 2  # a forward that was replaced before

    def fail(states):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_inside_heads([head], [torch.ones(2, 3)], fail)
    assert head.forward is own
    plain = nn.Linear(3, 5)
    with pytest.raises(ZeroDivisionError):
        run_inside_heads([plain], [torch.ones(2, 3)], fail)
    assert "forward" not in vars(plain)
