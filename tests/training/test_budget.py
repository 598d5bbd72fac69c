"""The dry run's estimates against the memory that PyTorch keeps during a tiny training with the same settings."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from logitmix.loss_head import fused_log_probs
from logitmix.mixture.head import Head
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.tasks import Arithmetic
from logitmix.training.budget import (
    Batches,
    Setup,
    head_bytes,
    kv_cache_bytes,
    layer_bytes,
    memory,
    peak,
    phase_bytes,
)
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.model_shape import adapter_size, model_shape
from logitmix.training.task_trainer import build_trainer
from tests.helpers.memory_peak import PeakMemory

# float32; float32 under bf16 autocast; bfloat16: bytes of the weights and of the products
PRECISIONS = {"float32": (4, 4), "autocast": (4, 2), "bfloat16": (2, 2)}


def config(**kwargs) -> Qwen2Config:
    sizes = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return Qwen2Config(**(sizes | kwargs))


def setup_of(*configs: Qwen2Config, precision: str = "float32", **kwargs) -> Setup:
    weight, compute = PRECISIONS[precision]
    return Setup(
        members=tuple(map(model_shape, configs)),
        **(
            {
                "reference": None, "weight": weight, "compute": compute, "rows": 2, "sampled": 0, "prompt": 0,
                "completion": 256, "checkpointing": False, "processes": 1, "sharded": False,
            }
            | kwargs
        ),
    )  # fmt: skip


def model_of(config: Qwen2Config, precision: str) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")


def left_padded(rows: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :5] = 0
    return {"input_ids": torch.randint(0, 300, (rows, length)), "attention_mask": mask}


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_is_the_models(tied):
    model = model_of(config(tie_word_embeddings=tied), "float32")
    shape = model_shape(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.embedding == 300 * 64 * (1 if tied else 2)
    assert (shape.layers, shape.kv_heads, shape.head_size) == (4, 2, 16)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_keeps_for_its_backward_pass_what_pytorch_keeps(precision):
    model = model_of(config(), precision).train()
    weights = {p.shape for p in model.parameters()} | {p.t().shape for p in model.parameters() if p.dim() == 2}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in weights:  # nor autocast's copies of them, which are a part of their own
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(precision):
        output = model.model(**left_padded(2, 256), use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output[0].requires_grad
    assert 4 * layer_bytes(setup_of(config(), precision=precision)) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_forward_and_its_backward_pass_peak_at_the_activations(precision, checkpointing):
    """Within a fifth. Autocast's copies of weights are counted as a separate part."""
    model = model_of(config(num_hidden_layers=12), precision).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch, measured = left_padded(2, 256), PeakMemory()
    for watch in (nullcontext(), measured):  # the first pass makes the weights' gradients
        with autocast(precision), watch:
            model.model(**batch, use_cache=False)[0].float().mean().backward()
    setup = setup_of(config(num_hidden_layers=12), precision=precision, checkpointing=checkpointing)
    sizes = {part.name: part.size for part in memory(setup)}
    expected = sizes["activations"] + sizes.get("weights, cast", 0)
    assert expected == pytest.approx(measured.peak, rel=0.2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_cache_of_all_members_is_exact(precision):
    members = [model_of(c, precision) for c in (config(), config(num_hidden_layers=3))]
    mixture = LogitMixForCausalLM.from_members(members[0], members[1])
    with torch.no_grad(), autocast(precision):
        cache = mixture(**left_padded(2, 48), use_cache=True).past_key_values
    measured = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    weight, _ = PRECISIONS[precision]
    assert sum(kv_cache_bytes(model_shape(m.config), 2 * 48, weight) for m in members) == measured


class State(TrainerCallback):
    """Bytes of gradients and moments in an update."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        moments = [t for s in optimizer.optimizer.state.values() for k, t in s.items() if k != "step"]
        self.moments = sum(t.nbytes for t in moments)


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> SimpleNamespace:
    folder, tokenizer = tmp_path_factory.mktemp("members"), character_tokenizer(Arithmetic.alphabet)
    for name in ("base", "sft"):
        tiny_model(len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return SimpleNamespace(base=str(folder / "base"), sft=str(folder / "sft"))


@pytest.mark.parametrize("arm", ["mixture", "KL", "adapters"])
def test_weights_gradients_and_moments_are_a_trainers(arm, members, tmp_path):
    args = LogitMixGRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1, max_completion_length=8,
        save_strategy="no", **ARMS[arm](members),
    )  # fmt: skip
    task, state = Arithmetic(), State()
    peft_config = LoraConfig(task_type="CAUSAL_LM", r=4) if arm == "adapters" else None
    trainer = build_trainer(task, task.problems("train", 64), members.base, args, peft_config=peft_config)
    trainer.add_callback(state)
    trainer.train()

    config = AutoConfig.from_pretrained(members.base)
    shape, model = model_shape(config), trainer.model
    setup = setup_of(config)
    if arm == "KL":
        setup = replace(setup, reference=shape)
        expected = {"policy's weights": nbytes(model), "reference's weights": nbytes(trainer.ref_model)}
    elif arm == "mixture":
        setup = replace(setup, members=(shape, shape))
        expected = {"policy's weights": nbytes(model.policy), "anchor's weights": nbytes(model.anchors[0])}
    else:
        setup = replace(setup, members=(shape, shape), adapter=adapter_size(config, peft_config), one_base=True)
        adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        expected = {"policy's weights": nbytes(model) - adapter, "adapter": adapter}
    sizes = {part.name: part.size for part in memory(setup)}
    assert {name: size for name, size in sizes.items() if name.endswith(("weights", "adapter"))} == expected
    assert sizes["gradients"] == state.gradients
    assert sizes["AdamW's two moments"] == state.moments


ARMS = {
    "mixture": lambda members: {"anchor": members.sft},
    "KL": lambda members: {"beta": 0.01, "loss_type": "grpo"},
    "adapters": lambda members: {"anchor": members.base},
}


def nbytes(model: torch.nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def test_the_loss_of_a_mixture_peaks_at_a_chunk_of_logits():
    """Within a third, with a chunk as large as on a device, where it dominates."""
    torch.manual_seed(0)
    rows, completion, vocabulary, hidden_size = 4, 256, 20_000, 16
    hidden = [torch.randn(rows * completion, hidden_size, requires_grad=k == 0) for k in range(2)]
    heads = [Head(torch.randn(vocabulary, hidden_size, requires_grad=k == 0)) for k in range(2)]
    targets, weights = torch.randint(0, vocabulary, (rows * completion,)), torch.tensor([0.5, 0.5])
    with PeakMemory() as measured:
        log_probs, _ = fused_log_probs(
            hidden, heads, weights, targets, chunk=rows * completion, tile=1 << 15,
            coefficients=lambda log_probs, tokens: torch.ones_like(log_probs),
        )  # fmt: skip
        log_probs.sum().backward()
    sizes = config(vocab_size=vocabulary, hidden_size=hidden_size, intermediate_size=16, num_hidden_layers=1)
    assert head_bytes(setup_of(sizes, sizes, rows=rows, completion=completion)) == pytest.approx(
        measured.peak, rel=0.35
    )


def test_sharing_divides_the_state_and_copying_it_exchanges_gradients():
    alone = setup_of(config(), config(), sampled=4)
    sizes = {part.name: part.size for part in memory(alone)}
    shared = {part.name: part.size for part in memory(replace(alone, processes=4, sharded=True))}
    for name in ("policy's weights", "anchor's weights", "AdamW's two moments", "gradients"):
        assert shared[name] == sizes[name] / 4
    copied = {part.name: part.size for part in memory(replace(alone, processes=4))}
    assert copied == sizes | {"gradients, to exchange": sizes["gradients"]}


def test_the_peak_is_the_worse_of_sampling_and_updating():
    small = memory(setup_of(config(), config(), sampled=1, prompt=1))
    large = memory(setup_of(config(), config(), sampled=1000, prompt=1))
    assert peak(small) == phase_bytes(small)["forward"] > phase_bytes(small)["sampling"]
    assert peak(large) == phase_bytes(large)["sampling"] > phase_bytes(large)["forward"]


def test_the_batches_of_the_paper():
    batches = Batches(
        rows=4,
        gradient_accumulation_steps=8,
        steps_per_generation=64,
        num_iterations=1,
        num_generations=8,
        processes=8,
    )
    assert batches.rollouts_per_outer_step == 256 * 8
    assert batches.rollouts_per_update == 256
    assert batches.updates_per_outer_step == 8
    assert batches.updates_in(questions=256 * 3 + 255) == 3 * 8
    assert replace(batches, num_iterations=2).updates_per_outer_step == 16
