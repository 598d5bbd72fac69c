"""`logitmix serve`: the command line of vLLM that it runs, and what it rejects. The server itself: tests/serving."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from logitmix.cli import serve
from logitmix.cli.__main__ import main
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.quantization import as_quantization
from logitmix.serving.alternating import alternating_decoding
from tests.helpers.adapters import save_adapter
from tests.helpers.members import character_tokenizer, tiny_member
from tests.helpers.paths import ROOT


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("base", "sft")):
        tiny_member("qwen2", seed).save_pretrained(tmp_path / name)
        character_tokenizer().save_pretrained(tmp_path / name)
    return tmp_path


def command_of(args, flags=()):
    arguments = serve.ServeArguments(**args)
    serve.validate_arguments(arguments, flags)
    return serve.vllm_command(arguments, flags)


def test_a_pair_is_saved_as_the_mixture_that_vllm_serves(folders):
    served = {"anchor": str(folders / "sft"), "alpha": 0.3, "output_dir": str(folders / "mixture")}
    command = command_of({"model_name_or_path": str(folders / "base")} | served, ["--port", "8001"])
    assert command[command.index("--model") + 1] == str(folders / "mixture")
    assert command[-2:] == ["--port", "8001"]
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    assert overrides["weights"] == pytest.approx([0.7, 0.3])
    assert overrides["scheme"] == "logit"
    assert overrides["alpha_range"] == [0.0, 1.0]
    assert "draft_member" not in overrides
    again = command_of({"model_name_or_path": str(folders / "mixture"), "draft_member": "anchor"})
    assert json.loads(again[again.index("--hf-overrides") + 1])["draft_member"] == "anchor_0"
    with pytest.raises(ValueError, match="there is no member 'teacher'"):
        command_of({"model_name_or_path": str(folders / "mixture"), "draft_member": "teacher"})
    again = command_of({"model_name_or_path": str(folders / "mixture"), "alpha": 0.6, "alpha_range": [-1.0, 1.0]})
    assert json.loads(again[again.index("--hf-overrides") + 1])["weights"] == pytest.approx([0.4, 0.6])
    with pytest.raises(ValueError, match="mixture exists"):
        command_of({"model_name_or_path": str(folders / "base")} | served)


@pytest.mark.parametrize("kind", ["models", "adapters"])
def test_a_pair_is_served_from_its_own_folders(folders, kind, monkeypatch):
    """The folder that vLLM loads holds no weights but an adapter's, and is a mixture for transformers too."""
    (folders / "temporary").mkdir()
    monkeypatch.setattr(serve.tempfile, "tempdir", str(folders / "temporary"))
    policy, anchor = str(folders / "base"), str(folders / "sft")
    if kind == "adapters":
        policy, anchor = (save_adapter(folders / name, policy, seed) for seed, name in enumerate(("p", "a"), 1))
    command = command_of({"model_name_or_path": policy, "anchor": anchor, "alpha": 0.3})
    folder = command[command.index("--model") + 1]
    assert command[command.index("--served-model-name") + 1] == "mixture"
    weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in (folders / "base").glob("*.safetensors"))
    assert weights < (whole / 2 if kind == "adapters" else 100)
    expected = LogitMixForCausalLM.from_members(policy, anchor, alpha=0.3)
    for name, weight in LogitMixForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name
    named = command_of({"model_name_or_path": policy, "anchor": anchor}, ["--served-model-name=mine"])
    assert "--served-model-name" not in named


@pytest.mark.filterwarnings("ignore:the tokenizer of .* appends")
def test_a_tokenizer_that_would_end_each_prompt_is_refused_for_vllm(folders):
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    for name in ("base", "sft"):
        tokenizer.save_pretrained(folders / name)
    served = {"model_name_or_path": str(folders / "base"), "anchor": str(folders / "sft")}
    command_of(served | {"output_dir": str(folders / "mixture")})  # saved without it
    tokenizer.save_pretrained(folders / "mixture")
    with pytest.raises(ValueError, match="appends <eos> to every prompt"):
        command_of({"model_name_or_path": str(folders / "mixture")})
    command_of({"model_name_or_path": str(folders / "mixture")}, ["--tokenizer", str(folders / "base")])


def test_a_saved_mixture_is_recognised_in_a_new_process(folders):
    """Nothing else there has registered the mixture with transformers."""
    mixture = str(folders / "mixture")
    command_of({"model_name_or_path": str(folders / "base"), "anchor": str(folders / "sft"), "output_dir": mixture})
    script = (
        "import sys; from logitmix.cli import serve; "
        "serve.os.execv, serve.find_spec = print, str; serve.main(sys.argv[1:])"
    )
    printed = subprocess.check_output([sys.executable, "-c", script, mixture], text=True)
    assert '"weights": [0.5, 0.5]' in printed


def test_the_mixture_is_saved_with_its_scheme(folders):
    served = {"model_name_or_path": str(folders / "base"), "anchor": str(folders / "sft"), "scheme": "prob"}
    served["output_dir"] = str(folders / "mixture")
    with pytest.raises(ValueError, match="scheme 'prob' needs weights >= 0"):
        command_of(served | {"alpha": 2.0, "alpha_range": [0.0, 3.0]})
    command_of(served | {"alpha": 0.3})  # the error left no folder behind
    again = command_of({"model_name_or_path": str(folders / "mixture")})
    assert json.loads(again[again.index("--hf-overrides") + 1])["scheme"] == "prob"


def test_the_command_of_the_docs_runs_the_one_it_names(folders, monkeypatch):
    page = (ROOT / "docs" / "serving.md").read_text()
    two_models, vllms = re.findall(r"^(logitmix serve --.*?|python -m vllm.*?)\n```", page, re.DOTALL | re.MULTILINE)
    (folders / "path/to").mkdir(parents=True)
    for name in ("base", "sft"):
        (folders / name).rename(folders / "path/to" / name)
    monkeypatch.chdir(folders)
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    become = []
    monkeypatch.setattr(serve.os, "execv", lambda path, command: become.append(command))
    assert main(shlex.split(two_models)[1:]) == 0
    assert main(["serve", "mixture", "--port", "8000"]) == 0

    def parsed(command):
        return [json.loads(word) if word.startswith("{") else word for word in command[1:]]

    assert parsed(become[0]) == parsed(become[1]) == parsed(shlex.split(vllms.replace("\\\n", "")))


def test_alternating_decoding_becomes_flags_of_vllm(folders):
    served = {"anchor": str(folders / "sft"), "output_dir": str(folders / "mixture"), "decoding": "alternating"}
    command = command_of({"model_name_or_path": str(folders / "base")} | served, ["--port", "8001"])
    expected = alternating_decoding()
    assert json.loads(command[command.index("--speculative-config") + 1]) == expected["speculative_config"]
    assert command[command.index("--worker-cls") + 1] == expected["worker_cls"]
    assert command[command.index("--scheduler-cls") + 1] == expected["scheduler_cls"]
    assert "--no-async-scheduling" in command
    assert command[-2:] == ["--port", "8001"]
    for decoding in ("auto", "joint"):
        served = {"model_name_or_path": str(folders / "mixture"), "decoding": decoding}
        assert "--speculative-config" not in command_of(served)


@pytest.mark.parametrize(
    ("args", "flags", "sentence"),
    [
        ({}, [], "needs the folder of a mixture"),
        ({"model_name_or_path": "base"}, [], "is not a mixture; give --anchor"),
        ({"model_name_or_path": "base", "anchor": "nowhere"}, [], "no model at 'nowhere'"),
        ({"model_name_or_path": "nowhere", "anchor": "sft"}, [], "no model at 'nowhere'"),
        ({"model_name_or_path": "base", "alpha_range": [1.0, 0.0]}, [], "two numbers, the lower first"),
        ({"model_name_or_path": "base"}, ["--hf-overrides", "{}"], "--hf-overrides is set"),
        ({"model_name_or_path": "base"}, ["--model", "other"], "--model is set from the first argument"),
        ({"model_name_or_path": "base", "alpha": 0.9, "alpha_range": [0.0, 0.5]}, [], r"alpha_range is \[0.0, 0.5\]"),
        ({"model_name_or_path": "base"}, ["--hf_overrides={}"], "--hf-overrides is set"),
        ({"model_name_or_path": "base"}, ["--hf-overrides.scheme", "prob"], "--hf-overrides is set"),
    ],
)
def test_wrong_input(folders, monkeypatch, args, flags, sentence):
    monkeypatch.chdir(folders)
    with pytest.raises(ValueError, match=sentence):
        command_of(args, flags)


def test_without_any_server_installed(monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert main(["serve", "somewhere"]) == 2
    assert "pip install 'logitmix[serve]'" in capsys.readouterr().err


def test_without_vllm_its_flags_are_rejected(monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    monkeypatch.setattr(serve, "is_serve_available", lambda: True)
    assert main(["serve", "somewhere", "--port", "8001", "--max-model-len", "128"]) == 2
    assert "vLLM is not installed, which --max-model-len is for" in capsys.readouterr().err


def test_a_quantised_anchor_is_refused_for_vllm(folders, monkeypatch):
    pytest.importorskip("torchao")
    anchor = tiny_member("qwen2", 1, hidden_size=64, intermediate_size=128)
    anchor.save_pretrained(folders / "sft")
    AutoModelForCausalLM.from_pretrained(folders / "sft", quantization_config=as_quantization("int8")).save_pretrained(
        folders / "quantized"
    )
    monkeypatch.chdir(folders)
    with pytest.raises(ValueError, match=r"anchor_0 has quantised weights, and vLLM .*; give the model that it was"):
        command_of({"model_name_or_path": "base", "anchor": "quantized"})


def test_without_vllm_a_pair_is_served_from_memory(folders, monkeypatch):
    without_vllm = pytest.importorskip("logitmix.serving.without_vllm", reason="needs pip install 'logitmix[serve]'")
    served = []
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    monkeypatch.setattr(without_vllm, "serve", lambda *args: served.append(args))
    monkeypatch.chdir(folders)
    before = set(folders.rglob("*"))
    flags = ["--anchor", "sft", "--alpha", "0.3", "--alpha_range", "0", "0.5", "--scheme", "prob"]
    assert main(["serve", "base", *flags]) == 0
    ((model, tokenizer, name, *_),) = served
    assert (model.alpha, model.config.scheme, model.config.alpha_range, name) == (0.3, "prob", [0.0, 0.5], "mixture")
    assert tokenizer("1+2")["input_ids"]
    assert set(folders.rglob("*")) == before
