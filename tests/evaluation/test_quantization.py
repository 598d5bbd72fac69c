"""What quantising a model changes, on a task's questions."""

import pytest
import torch

from logitmix.cli.__main__ import main
from logitmix.evaluation.quantization import compare_quantized
from logitmix.mixture.loading import load_member
from logitmix.mixture.quantization import as_quantization
from logitmix.paper.tiny_model import character_tokenizer
from logitmix.tasks import Arithmetic
from tests.helpers.commands import error_of, save_member

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_member(tmp_path_factory.mktemp("model") / "m", seed=0)


def test_the_kl_and_agreement_are_those_at_each_token_of_the_originals_responses(model):
    task, tokenizer = Arithmetic(), character_tokenizer(Arithmetic.alphabet)
    problems = task.problems("test", 5)
    original, quantized = load_member(model), load_member(model, quantization_config=as_quantization("int4"))
    change = compare_quantized(original, quantized, tokenizer, task, problems, max_new_tokens=6, batch_size=3)
    kls, agreements = [], []
    for problem in problems:  # one question, one token at a time, in float64
        ids = tokenizer(task.template.prompt(problem.question))["input_ids"]
        for _ in range(6):
            inputs = {"input_ids": torch.tensor([ids])}
            with torch.no_grad():
                p, q = (m(**inputs).logits[0, -1].double().log_softmax(-1) for m in (original, quantized))
            kls.append((p.exp() * (p - q)).sum().item())
            agreements.append(p.argmax() == q.argmax())
            ids = [*ids, p.argmax().item()]
            if ids[-1] == tokenizer.eos_token_id:
                break
    assert change.tokens == len(kls)
    assert change.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert change.kl > 0
    assert change.worst == pytest.approx(max(kls), rel=1e-3)
    assert change.agreement == pytest.approx(sum(agreements) / len(agreements))
    assert change.sizes[1] < change.sizes[0]
    same = compare_quantized(original, original, tokenizer, task, problems, max_new_tokens=6)
    assert (same.kl, same.agreement) == (0, 1)


def test_the_command_prints_them(model, capsys):
    argv = ["check-quantization", model, "--task", "arithmetic", "--eval_limit", "3", "--max_new_tokens", "4"]
    assert main([*argv, "--quantization", "int8"]) == 0
    output = capsys.readouterr().out
    assert "3 of arithmetic, 12 tokens" in output
    assert "nats a token" in output
    assert "give one of --quantization" in error_of(capsys, argv)
    assert "the quantisation is 'int1'; it must be int8" in error_of(capsys, [*argv, "--quantization", "int1"])
