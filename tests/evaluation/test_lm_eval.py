"""lm-evaluation-harness on a mixture's checkpoint: one of the harness's tasks, with local questions."""

import json
import string
import sys
from pathlib import Path

import pytest
import torch

from logitmix.cli.__main__ import main
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.presets import dexperts, guidance
from logitmix.paper.tiny_model import tiny_model
from tests.helpers.members import character_tokenizer

QUESTIONS = [
    ("Which of these is a gas at room temperature?", ["iron", "oxygen", "salt", "wood"], "B"),
    ("Plants make sugar from water and", ["carbon dioxide", "sand", "plastic"], "A"),
    ("What does a thermometer measure?", ["mass", "time", "temperature", "speed"], "C"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A saved mixture of two tiny models, with a tokenizer of all printable characters, and beside it presets."""
    root = tmp_path_factory.mktemp("mixture")
    tokenizer = character_tokenizer("".join(sorted(set(string.printable) - set("\r\x0b\x0c"))))
    for seed, name in enumerate(("base", "sft", "antiexpert")):
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    model = LogitMixForCausalLM.from_members(str(root / "base"), str(root / "sft"), alpha=0.3)
    model.save_pretrained(root / "mixture")
    dexperts(*(str(root / name) for name in ("base", "sft", "antiexpert"))).save_pretrained(root / "dexperts")
    guidance(str(root / "base"), "Question: ").save_pretrained(root / "guidance")
    return str(root / "mixture")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """The harness's configuration of ARC easy, with questions from a local file."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval to test the mixture in lm-evaluation-harness")
    folder = tmp_path_factory.mktemp("tasks")
    arc = Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_easy.yaml"
    rows = [
        {"question": q, "choices": {"text": texts, "label": list("ABCD"[: len(texts)])}, "answerKey": key}
        for q, texts, key in QUESTIONS
    ]
    data = folder / "questions.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "local_arc.yaml").write_text(
        f"include: {arc}\ntask: local_arc\ndataset_path: json\ndataset_name: null\ntraining_split: null\n"
        f"validation_split: null\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "alpha"), [("mixture", None), ("mixture", 0.8), ("dexperts", None), ("guidance", None)]
)
def test_the_scores_of_the_harness_match_the_mixture(checkpoint, tasks, tmp_path, name, alpha):
    checkpoint = str(Path(checkpoint).with_name(name))
    arguments = f"pretrained={checkpoint},dtype=float32" + (f",alpha={alpha}" if alpha is not None else "")
    flags = ["--model", "hf", "--model_args", arguments, "--tasks", "local_arc", "--include_path", str(tasks)]
    flags += ["--device", "cpu", "--batch_size", "2", "--log_samples", "--output_path", str(tmp_path / "out")]
    assert main(["lm-eval", *flags]) == 0
    (file,) = (tmp_path / "out").rglob("samples_local_arc_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(samples) == len(QUESTIONS)

    model = LogitMixForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = model.tokenizer
    compared = 0
    for sample in samples:
        arguments = sample["arguments"]
        for request, ((log_likelihood, _),) in zip(arguments.values(), sample["resps"], strict=True):
            context, continuation = request["arg_0"], request["arg_1"]
            ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
            labels = ids.clone()
            labels[:, : len(tokenizer(context)["input_ids"])] = -100
            with torch.no_grad():
                log_probs, _ = model.score(ids, torch.ones_like(ids), labels, alpha=alpha)
            assert float(log_likelihood) == pytest.approx(log_probs.sum().item(), abs=1e-4)
            compared += 1
    assert compared == sum(len(texts) for _, texts, _ in QUESTIONS)


def test_the_score_depends_on_alpha(checkpoint):
    model = LogitMixForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        scores = [model.score(ids, torch.ones_like(ids), ids, alpha=alpha)[0].sum() for alpha in (None, 0.3, 0.8)]
    assert scores[0] == scores[1]
    assert abs(scores[1] - scores[2]) > 1e-2


def test_without_the_harness_the_command_says_how_to_install_it(monkeypatch, capsys):
    for module in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["lm-eval", "--model", "hf"]) == 2
    assert "pip install 'lm-eval>=0.4.11'" in capsys.readouterr().err
