"""Trainers of a tiny mixture, and what they sample and score."""

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GenerationConfig
from trl import GRPOConfig

from logitmix.mixture.generation import default_generation_config
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.padding import left_pad
from logitmix.training.config import LogitMixGRPOConfig
from logitmix.training.grpo import LogitMixGRPOTrainer
from tests.helpers.arguments import SMALL_RUN
from tests.helpers.members import character_tokenizer, tiny_member

PROMPTS = ["ab=", "12+34-5=", "x"]
EPS = 1e-4  # TRL's, in the advantage


def count_vowels(completions, **kwargs):
    return [float(sum(c in "aeiou" for c in completion)) for completion in completions]


def mixture(scheme="logit", alpha=0.4, anchor="llama", policy="qwen2"):
    return LogitMixForCausalLM.from_members(
        tiny_member(policy, seed=0), tiny_member(anchor, seed=1), alpha=alpha, scheme=scheme
    )


def trainer_of(
    tmp_path,
    model=None,
    reward=count_vowels,
    prompts=PROMPTS,
    rows=None,
    trainer=LogitMixGRPOTrainer,
    peft_config=None,
    tokenizer=None,
    tools=None,
    **kwargs,
):
    arguments = {
        "per_device_train_batch_size": 12,
        "num_generations": 4,
        "max_completion_length": 9,
        "max_steps": 2,
        "learning_rate": 1e-2,
        **SMALL_RUN,
    } | kwargs
    config = (LogitMixGRPOConfig if trainer is LogitMixGRPOTrainer else GRPOConfig)(str(tmp_path), **arguments)
    result = trainer(
        model if model is not None else mixture(),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows) if rows else Dataset.from_dict({"prompt": prompts * 8}),
        processing_class=tokenizer or character_tokenizer(),
        peft_config=peft_config,
        tools=tools,
    )
    result.current_gradient_accumulation_steps = config.gradient_accumulation_steps
    return result


def assert_same_weights(model, expected):
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))


def sampled(trainer, seed=0):
    """Left-padded prompts, completions, their mask, and the log-probabilities of the distributions sampled from."""
    tokenizer = trainer.processing_class
    input_ids, attention_mask = left_pad(tokenizer(PROMPTS)["input_ids"], tokenizer.pad_token_id, torch.device("cpu"))
    torch.manual_seed(seed)
    with default_generation_config(trainer.model):
        output = trainer.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(**trainer.generation_kwargs | {"eos_token_id": None}),
            output_scores=True,
            return_dict_in_generate=True,
        )
    completions = output.sequences[:, input_ids.shape[1] :]
    log_probs = torch.stack(output.scores, 1).log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    mask = torch.cat([attention_mask, torch.ones_like(completions)], 1)
    return output.sequences, mask, completions.shape[1], log_probs


def generated(trainer):
    """The batch of an outer step, with old log-probabilities that differ from the current ones."""
    torch.manual_seed(3)
    rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(4)]
    inputs = trainer._generate_and_score_completions(rows)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    length = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)
    # far enough for the clip to act on both sides
    inputs["old_per_token_logps"] = now + 0.3 * torch.randn(now.shape, generator=torch.Generator().manual_seed(1))
    return inputs, ids, mask


def mixture_with_adapters():
    base = tiny_member("qwen2", seed=0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return LogitMixForCausalLM.from_members(base, base, alpha=0.4, peft_config=config)


# A mixture for each kind of head that the loss head distinguishes
LOSS_HEAD_MODELS = {
    "untied heads": lambda: mixture(),
    "tied heads": lambda: LogitMixForCausalLM.from_members(
        tiny_member("qwen2", seed=0, tie_word_embeddings=True), tiny_member("gpt2", seed=1), alpha=0.4
    ),
    "soft cap": lambda: mixture(policy="gemma2"),
    "prob": lambda: mixture("prob"),
    "one frozen head": mixture_with_adapters,
    "another vocabulary": lambda: LogitMixForCausalLM.from_members(
        tiny_member("qwen2", seed=0, vocab_size=70), tiny_member("llama", seed=1), alpha=0.4
    ),
}
