"""A tool, and a tiny policy and anchor that know one call of it and the answer by heart."""

import copy
from itertools import chain
from pathlib import Path

import torch
import trl

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.tiny_model import character_tokenizer
from tests.helpers.members import tiny_member

QUESTION = [{"role": "user", "content": "3+4"}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>'
RESULT = "\n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
ANSWER = "<think>\n\n</think>\n\nso 7<|im_end|>"


def add(a: int, b: int) -> int:
    """Add two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        Their sum.
    """
    return a + b


def tool_tokenizer():
    """A token per character, and TRL's copy of Qwen3's chat template, which has tools."""
    tokenizer = character_tokenizer("\n" + "".join(map(chr, range(32, 127))))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


def tool_user(tokenizer):
    """A model that answers the question by the call, and the tool's result by the answer."""
    prompt = tokenizer.apply_chat_template(QUESTION, tools=[add], add_generation_prompt=True, tokenize=False)
    pieces = [(prompt, False), (CALL, True), (RESULT, False), (ANSWER, True)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in pieces]
    labels = [x if learnt else [-100] * len(x) for x, (_, learnt) in zip(ids, pieces, strict=True)]
    input_ids, labels = (torch.tensor([list(chain(*parts))]) for parts in (ids, labels))
    model = tiny_member(
        "qwen2", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1200,
        vocab_size=len(tokenizer), initializer_range=0.05, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    worst = torch.tensor(torch.inf)  # of the learnt tokens
    while worst > 0.1:
        logits = model.train()(input_ids=input_ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none")
        losses.sum().div(len(ids[1]) + len(ids[3])).backward()
        worst = losses.max()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def tool_mixture(policy):
    """The policy, and an anchor that disagrees with it a little."""
    anchor = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in anchor.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return LogitMixForCausalLM.from_members(copy.deepcopy(policy), anchor, alpha=0.4)
