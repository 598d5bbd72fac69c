"""Distilling a mixture into one model: what is sampled, what is learnt, what is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer

from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.training.distillation import LogitMixDistillationConfig
from logitmix.training.students import build_student
from tests.helpers.distill import distiller_of
from tests.helpers.grpo import PROMPTS, mixture
from tests.helpers.loss_head import both_schemes
from tests.helpers.members import CHARACTERS, INPUT, character_tokenizer, tiny_member


def rows(n: int = 6) -> list[dict[str, str]]:
    return [{"prompt": PROMPTS[i % len(PROMPTS)]} for i in range(n)]


def batch_of(trainer):
    torch.manual_seed(0)
    trainer.model.train()
    return trainer._generate_and_score_completions(rows())


def gradients_of(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@both_schemes
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("student", ["policy", "gemma2"])
def test_the_fused_loss_is_that_of_whole_logits(tmp_path, scheme, beta, student):
    student = student if student == "policy" else tiny_member(student, seed=3)
    options = {"beta": beta, "temperature": 0.8, "teacher": mixture(scheme)}
    fused = distiller_of(tmp_path, student=student, **options)
    reference = distiller_of(tmp_path, student=copy.deepcopy(fused.model), loss_head="reference", **options)
    batch = batch_of(fused)
    (loss, gradients), (expected, of_reference) = gradients_of(fused, batch), gradients_of(reference, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert gradients.keys() == of_reference.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_reference[name], rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_divergence_of_the_completions_tokens(tmp_path):
    trainer = distiller_of(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    batch = batch_of(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    T = batch["completion_ids"].shape[1]
    total = 0.0
    with torch.no_grad():
        for i in range(len(ids)):  # one sequence at a time, without padding
            own = mask[i].bool()
            n = int(batch["completion_mask"][i].sum())
            student, teacher = (
                m(input_ids=ids[i : i + 1, own]).logits[0, -n - 1 : -1].log_softmax(-1)
                for m in (trainer.model.eval(), trainer.teacher)
            )
            total += (student.exp() * (student - teacher)).sum().item()
    trainer.model.train()
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert T == 7
    torch.testing.assert_close(
        gradients_of(trainer, batch)[0].item(), total / mask[:, -T:].sum().item(), rtol=1e-4, atol=1e-6
    )


def test_tokens_that_a_tool_wrote_do_not_count(tmp_path):
    trainer = distiller_of(tmp_path)
    batch = batch_of(trainer)
    of_model = torch.ones_like(batch["completion_mask"])
    of_model[:, 2:5] = 0
    masks = [torch.ones_like(of_model), of_model, 1 - of_model]
    with torch.no_grad():
        (whole, *_), (total, _, count), (rest, *_) = (
            trainer.loss(trainer.model, batch | {"tool_mask": mask}, 1) for mask in masks
        )
    assert count == (batch["completion_mask"] * of_model).sum()
    assert rest > 0.1
    torch.testing.assert_close(total + rest, whole)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_student_approaches_the_mixture_and_the_mixture_stays(tmp_path, beta):
    teacher = mixture()
    before = copy.deepcopy(teacher.state_dict())
    options = {"max_completion_length": 1, "max_steps": 15, "num_train_epochs": 20, "learning_rate": 3e-3}
    trainer = distiller_of(tmp_path, teacher, beta=beta, **options)
    batch = batch_of(trainer)
    first, _ = gradients_of(trainer, batch)
    trainer.train()
    assert gradients_of(trainer, batch)[0] < 0.5 * first
    torch.testing.assert_close(dict(teacher.state_dict()), dict(before), rtol=0, atol=0)
    assert not teacher.training


def test_a_student_that_is_the_mixture_learns_nothing(tmp_path):
    teacher = mixture(alpha=0.0)
    trainer = distiller_of(tmp_path, teacher)
    loss, gradients = gradients_of(trainer, batch_of(trainer))
    assert abs(loss) < 1e-6
    assert max(g.abs().max() for g in gradients.values()) < 1e-5


# --- who samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lmbda", "sampler"), [(1.0, "student"), (0.0, "mixture")])
def test_lmbda_says_who_samples(tmp_path, lmbda, sampler):
    teacher = mixture(alpha=0.9)
    trainer = distiller_of(tmp_path, teacher, lmbda=lmbda, temperature=0.01)
    batch = batch_of(trainer)
    greedy = {"student": trainer.model, "mixture": teacher}[sampler]
    prompt, completion = batch["prompt_ids"], batch["completion_ids"]
    with torch.no_grad():
        first = greedy.eval()(input_ids=prompt, attention_mask=batch["prompt_mask"]).logits[:, -1].argmax(-1)
    assert torch.equal(first, completion[:, 0])


def test_the_share_of_the_students_updates_is_lmbda_and_the_same_after_a_resume(tmp_path):
    trainer = distiller_of(tmp_path, lmbda=0.3)
    trainer.model.train()

    def choices() -> list[bool]:
        found = []
        for trainer.state.global_step in range(400):
            found.append(trainer.student_samples())
        return found

    first = choices()
    assert 0.2 < sum(first) / len(first) < 0.4
    assert choices() == first


def test_completions_end_at_stop_strings(tmp_path):
    trainer = distiller_of(tmp_path, stop_strings=["a", "e", "="], max_completion_length=40)
    batch = batch_of(trainer)
    rows = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    texts = trainer.processing_class.batch_decode([ids[mask.bool()] for ids, mask in rows], skip_special_tokens=True)
    assert all(c not in text[:-1] for text in texts for c in "ae=")
    assert any(text[-1:] in ("a", "e", "=") for text in texts)


def test_a_student_with_more_logits_samples_only_tokens_of_the_mixture(tmp_path):
    trainer = distiller_of(tmp_path, student=tiny_member(vocab_size=100), generation_kwargs={"suppress_tokens": [5]})
    completions = batch_of(trainer)["completion_ids"]
    assert 5 not in completions
    assert 40 < completions.max() < 61
    trainer.train()


# --- students ---------------------------------------------------------------------------------------------------


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUT).logits


def test_a_student_starts_from_a_member_with_weights_of_its_own():
    teacher = mixture(policy="qwen2", anchor="llama")
    for name, member in (("policy", teacher.policy), ("anchor", teacher.anchors[0])):
        student = build_student(teacher, name)
        torch.testing.assert_close(logits(student), logits(member), rtol=0, atol=0)
        assert all(p.requires_grad for p in student.parameters())
        with torch.no_grad():
            next(student.parameters()).add_(1.0)
        assert not torch.equal(logits(student), logits(member))


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])])
def test_a_members_name_is_the_member_also_where_a_folder_has_it(tmp_path, monkeypatch, peft_config):
    teacher = mixture()
    monkeypatch.chdir(tmp_path)
    tiny_member(seed=7).save_pretrained("policy")
    character_tokenizer().save_pretrained("policy")
    student = build_student(teacher, "policy", str(tmp_path / "base"), peft_config)
    assert torch.equal(logits(student), logits(teacher.policy))
    of_folder = build_student(teacher, "./policy", str(tmp_path / "base"), peft_config)
    torch.testing.assert_close(logits(of_folder), logits(tiny_member(seed=7)))


def test_merged_weights_are_the_average_at_alpha():
    teacher = mixture(anchor="qwen2", alpha=0.3)
    student = build_student(teacher, "merged")
    for merged, policy, anchor in zip(
        student.parameters(), teacher.policy.parameters(), teacher.anchors[0].parameters(), strict=True
    ):
        torch.testing.assert_close(merged, 0.7 * policy + 0.3 * anchor)
    with pytest.raises(ValueError, match=r"cannot be merged: .*; start the student from policy or anchor"):
        build_student(mixture(anchor="llama"), "merged")
    teacher.config.set_weights([1.0, 0.5])
    with pytest.raises(ValueError, match=r"no alpha gives the mixture's weights \[1.0, 0.5\].*or set alpha"):
        build_student(teacher, "merged")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    for name, seed in (("base", 0), ("other", 5)):
        tiny_member(seed=seed).save_pretrained(folder / name)
        character_tokenizer().save_pretrained(folder / name)
    tiny_member(seed=6).save_pretrained(folder / "letters")
    character_tokenizer(CHARACTERS[::-1]).save_pretrained(folder / "letters")
    return folder


@pytest.fixture
def on_one_base(folders):
    """A policy with a new adapter, whose anchor is its base."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return LogitMixForCausalLM.from_members(
        str(folders / "base"), str(folders / "base"), alpha=0.4, peft_config=config
    )


@pytest.mark.parametrize("name", ["policy", "anchor", "merged"])
def test_a_student_of_members_on_one_base_is_a_whole_model(on_one_base, name):
    before = logits(on_one_base)
    student = build_student(on_one_base, name)
    assert not hasattr(student, "peft_config")
    if name != "merged":
        weights = {"policy": [1.0, 0.0], "anchor": [0.0, 1.0]}[name]
        with torch.no_grad():
            expected = on_one_base(**INPUT, weights=weights).logits
        torch.testing.assert_close(logits(student), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1)
    torch.testing.assert_close(logits(on_one_base), before, rtol=0, atol=0)


def test_an_adapter_is_all_that_trains_and_peft_loads_it(tmp_path, folders):
    teacher = LogitMixForCausalLM.from_members(str(folders / "base"), str(folders / "other"), alpha=0.4)
    student = build_student(teacher, "anchor", str(tmp_path / "run" / "base"))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = distiller_of(tmp_path / "run", teacher, student, peft_config=config)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert all("lora" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if name in base:
            torch.testing.assert_close(parameter, base[name], rtol=0, atol=0)
    trainer.save_model()
    from peft import AutoPeftModelForCausalLM

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_student_without_a_folder_names_one_that_is_written(tmp_path):
    teacher = mixture()
    student = build_student(teacher, "policy", str(tmp_path / "base"))
    assert student.name_or_path == str(tmp_path / "base"), "not that of the member, whose weights have changed since"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.testing.assert_close(logits(saved), logits(teacher.policy))


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_student_of_another_tokenizer_is_refused(folders):
    teacher = LogitMixForCausalLM.from_members(str(folders / "base"), str(folders / "other"))
    with pytest.raises(ValueError, match="tokenizers differ: token 3 is"):
        build_student(teacher, str(folders / "letters"))
    with pytest.raises(ValueError, match="no model at 'nowhere'"):
        build_student(teacher, "nowhere")


def test_a_student_with_fewer_logits_than_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the student has logits for 40 tokens, and the mixture for 61"):
        distiller_of(tmp_path, student=tiny_member(vocab_size=40))


def test_a_teacher_that_is_no_mixture_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="the teacher is a Qwen2ForCausalLM, not a mixture; TRL's DistillationTrainer"
    ):
        distiller_of(tmp_path, teacher=tiny_member(), student=tiny_member())
    with pytest.raises(ValueError, match="the student is a mixture"):
        distiller_of(tmp_path, student=mixture())


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules=["q_proj"])])
def test_a_student_that_is_the_mixtures_own_member_is_refused(tmp_path, peft_config):
    teacher = mixture()
    with pytest.raises(ValueError, match=r"the student is a member of the mixture itself.*build_student"):
        distiller_of(tmp_path, teacher, teacher.policy, peft_config=peft_config)
    assert not any("lora" in name for name, _ in teacher.named_parameters())
    with pytest.raises(ValueError, match=r"the student is None, which is no model"):
        distiller_of(tmp_path, teacher, None)


def test_a_student_without_weights_that_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the student has no weights that train"):
        distiller_of(tmp_path, student=tiny_member().requires_grad_(False))


def test_more_tokens_than_the_context_holds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="with max_completion_length 125 that exceeds the members' context of 128"):
        distiller_of(tmp_path, max_completion_length=125)
    with pytest.raises(ValueError, match="exceeds the members' context of 16"):
        distiller_of(tmp_path, student=tiny_member(max_position_embeddings=16), max_completion_length=12)


def test_more_prompts_than_the_data_set_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the data set has 24 prompts, fewer than the 25 of an update"):
        distiller_of(tmp_path, per_device_train_batch_size=25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lmbda": 1.5}, "lmbda is 1.5; it must be between 0"),
        ({"beta": 2.0}, "beta must be in"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": float("inf")}, "temperature is inf; it must be above 0, and finite"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 2.0}, "top_p is 2.0; it must be above 0"),
        ({"max_steps": 0}, "max_steps is 0; it must be above 0, or -1"),
        ({"max_completion_length": None}, "max_completion_length is None"),
        ({"lmbda": "often"}, "lmbda"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True cannot be used"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        LogitMixDistillationConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = distiller_of(tmp_path)
    batch = batch_of(trainer)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss of update 1 is nan"):
        trainer.compute_loss(trainer.model, batch)


def test_trls_own_trainer_trains_as_ours_for_a_teacher_of_one_member(tmp_path):
    """At alpha 1 the mixture is the anchor, which TRL's trainer can have as its teacher."""
    teacher = mixture(alpha=1.0)
    trainer = distiller_of(tmp_path, teacher)
    batch = batch_of(trainer)
    options = {key: getattr(trainer.args, key) for key in ("max_completion_length", "per_device_train_batch_size")}
    trls = DistillationTrainer(
        build_student(teacher, "policy"),
        copy.deepcopy(teacher.anchors[0]),
        DistillationConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, **options
        ),
        train_dataset=trainer.train_dataset,
        processing_class=character_tokenizer(),
    )
    (loss, gradients), (expected, of_trl) = gradients_of(trainer, batch), gradients_of(trls, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_trl[name], rtol=1e-2, atol=1e-4)
