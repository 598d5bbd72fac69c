"""Each command on each saved preset: what it does is right for the preset, or it refuses it and says why."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from logitmix.cli.__main__ import main
from logitmix.evaluation.decode import make_decoder
from logitmix.evaluation.distillation import compare_tokens
from logitmix.evaluation.requests import make_requests
from logitmix.evaluation.samples import sample_mixture
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.presets import contrastive_decoding, dexperts, ensemble, guidance, proxy_tuning
from logitmix.tasks import Arithmetic
from tests.helpers.distill import distiller_of

PRESETS = {
    "dexperts": lambda a, b, c: dexperts(a, b, c, alpha=1.5),
    "proxy_tuning": lambda a, b, c: proxy_tuning(a, b, c),
    "contrastive_decoding": lambda a, b, c: contrastive_decoding(a, b, alpha=0.7),
    "its original": lambda a, b, c: contrastive_decoding(a, b, alpha=None),
    "guidance": lambda a, b, c: guidance(a, "1+2=?\n", 2.0),
    "product": lambda a, b, c: ensemble([a, b], [1, 1]),
    "pool": lambda a, b, c: ensemble([a, b, c], [0.5, 0.2, 0.3], "prob"),
}
OF_THREE = ("dexperts", "proxy_tuning", "pool")
CUT = ("contrastive_decoding", "its original")
OWN_PROMPT = "gives all members the same tokens, but the mixture has a prompt of its own for anchor_0"
ONE_ANCHOR = "has 2 anchors, but alpha is the weight of one"
PLAUSIBILITY = "the mixture has plausibility 0.1: "
ENOUGH = ("--eval_limit", "6", "--max_new_tokens", "3")  # for a comparison
# of the presets that a command refuses, what its sentence says
REFUSED = {
    "eval": {},
    "inspect": {},
    "export": {},
    "sweep --weights simplex": {},
    "sweep": dict.fromkeys(OF_THREE, ONE_ANCHOR),
    "realign": dict.fromkeys(OF_THREE, ONE_ANCHOR)
    | dict.fromkeys(CUT, f"{PLAUSIBILITY}it rules out tokens")
    | {"guidance": f"realign {OWN_PROMPT}"},
    "complement": dict.fromkeys(OF_THREE, "has 2 anchors, and a comparison takes two policies: logitmix eval"),
    "distill": dict.fromkeys(CUT, f"{PLAUSIBILITY}the tokens that it rules out have probability 0")
    | {"guidance": f"distillation {OWN_PROMPT}"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each saved preset, and of its three members."""
    root, tokenizer = tmp_path_factory.mktemp("presets"), character_tokenizer(Arithmetic.alphabet)
    members = [str(root / name) for name in "abc"]
    for seed, folder in enumerate(members):
        torch.manual_seed(seed)
        tiny_model(len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name, build in PRESETS.items():
        build(*members).save_pretrained(root / name)
    return root


def flags_of(command, source, out):
    decoded = ("--model_name_or_path", source, "--eval_limit", "2", "--max_new_tokens", "4")
    return {
        "eval": ("eval", *decoded, "--output_dir", str(out)),
        "inspect": ("inspect", "7+8-9", *decoded[:2], *decoded[4:], "--output_file", str(out / "page.html")),
        "export": ("export", *decoded[:2], "--member", "anchor_0", "--output_dir", str(out / "member")),
        "sweep": ("sweep", *decoded, "--mixes", "logit", "--alphas", "0.5", "-1", "--output_dir", str(out)),
        "sweep --weights simplex": (
            *("sweep", *decoded, "--weights", "simplex", "--simplex_parts", "2", "--output_dir", str(out)),
        ),
        "realign": ("realign", *decoded, "--alphas", "0.5", "--num_samples", "1"),
        "complement": ("complement", source, *ENOUGH, "--output_dir", str(out)),
    }[command]


@pytest.mark.parametrize("command", [command for command in REFUSED if command != "distill"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_command_takes_a_preset_or_says_why_not(folders, tmp_path, capsys, command, name):
    reason = REFUSED[command].get(name)
    status = main(list(flags_of(command, str(folders / name), tmp_path)))
    error = capsys.readouterr().err
    assert (status, reason is None or reason in error) == (0 if reason is None else 2, True), error
    if reason is None and command == "eval":
        assert written(tmp_path)["mixture"] == decoded(folders / name, "mixture", LogitMixForCausalLM)
    if command in ("eval", "sweep") and reason is None:  # the members alone, too, are those of their folders
        assert written(tmp_path)["policy"] == decoded(folders / "a", "model", AutoModelForCausalLM)
    if command == "export":
        pair = (tmp_path / "member", folders / ("a" if name == "guidance" else "b"))
        exported, source = map(AutoModelForCausalLM.from_pretrained, pair)
        assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), source.parameters(), strict=True))


def written(folder):
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    names = dict.fromkeys(row["name"] for row in rows)
    return {name: [row["response"] for row in rows if row["name"] == name] for name in names}


def decoded(folder, name, model_class):
    """Greedy responses of the saved model itself, with none of the command's arguments."""
    task, model = Arithmetic(), model_class.from_pretrained(folder).eval()
    tokenizer = character_tokenizer(Arithmetic.alphabet)
    decode = make_decoder(model, tokenizer, task, task.problems("test", 2), 4, decoding="joint")
    (responses,) = decode([make_requests({name: None}, 2)])
    return [response.response for response in responses]


@pytest.mark.parametrize("name", PRESETS)
def test_distillation_takes_a_preset_or_says_why_not(folders, tmp_path, name):
    mixture, reason = LogitMixForCausalLM.from_pretrained(folders / name), REFUSED["distill"].get(name)
    tokenizer = character_tokenizer(Arithmetic.alphabet)
    if reason is None:
        assert distiller_of(tmp_path, mixture, tokenizer=tokenizer).teacher is mixture
        return
    with pytest.raises(ValueError, match=reason):
        distiller_of(tmp_path, mixture, tokenizer=tokenizer)


def test_two_members_of_three_are_compared_by_their_responses(folders, tmp_path, capsys):
    source = str(folders / "dexperts")
    assert main(["eval", "--model_name_or_path", source, *ENOUGH, "--output_dir", str(tmp_path)]) == 0
    assert main(["complement", f"{tmp_path}:policy", f"{tmp_path}:anchor_1"]) == 0
    assert main(["complement", source, str(folders / "guidance"), *ENOUGH]) == 0


def test_the_weights_of_no_alpha_are_not_given_one(folders):
    model = LogitMixForCausalLM.from_pretrained(folders / "its original")
    with pytest.raises(ValueError, match=r"no alpha gives the weights \[1.0, -1.0\], which do not sum to 1"):
        _ = model.alpha


@pytest.mark.parametrize("name", ["guidance", "its original"])
def test_sft_samples_a_preset_that_on_policy_distillation_refuses_and_compares_its_tokens(folders, tmp_path, name):
    task, mixture = Arithmetic(), LogitMixForCausalLM.from_pretrained(folders / name).eval()
    tokenizer, problems = character_tokenizer(Arithmetic.alphabet), task.problems("test", 2)
    responses = sample_mixture(
        mixture, tokenizer, task, problems, str(tmp_path), {}, samples=1, max_new_tokens=4, temperature=1.0, seed=0,
        batch_size=2,
    )  # fmt: skip
    prompt_ids = [tokenizer(task.prompt(problem))["input_ids"] for problem in problems]
    student = AutoModelForCausalLM.from_pretrained(folders / "a").eval()
    found = compare_tokens(student, mixture, tokenizer, responses, prompt_ids)

    kls, agreeing = [], 0
    for response in responses:
        ids = tokenizer(response.response, add_special_tokens=False)["input_ids"]
        for t in range(len(ids)):
            prompt = prompt_ids[response.problem]
            log_m, log_s = log_p(mixture, prompt, ids[:t]), log_p_of(student, prompt + ids[:t])
            kls.append(float((log_m.exp() * (log_m - log_s).masked_fill(log_m.isneginf(), 0)).sum()))
            agreeing += int(log_m.argmax() == log_s.argmax())
    assert (found.tokens, found.agreement) == (len(kls), agreeing / len(kls))
    assert found.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3, abs=1e-4)


def log_p_of(member, ids):
    with torch.no_grad():
        return member(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def log_p(mixture, prompt_ids, ids):
    """The mixture's log-probabilities of the next token, from each member's own prompt."""
    own, config = mixture.config.member_prompts, mixture.config
    models = {name: getattr(mixture, config.model_of(name)) for name in config.members}
    logs = [log_p_of(model, own.get(name, prompt_ids) + ids) for name, model in models.items()]
    mixed = sum(weight * each for weight, each in zip(config.weights, logs, strict=True))
    if config.plausibility is not None:
        mixed[logs[0].exp() < config.plausibility * logs[0].exp().max()] = -torch.inf
    return mixed.log_softmax(-1)
