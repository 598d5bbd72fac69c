"""How surely models open a template's format, and the trial of all templates with a model."""

import pytest
import torch

from logitmix.cli.__main__ import main
from logitmix.evaluation.openings import Opening, measure_openings, opening_weights, summarise
from logitmix.evaluation.report.tables import opening_notes
from logitmix.evaluation.template_trials import try_templates
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.paper.tiny_model import character_tokenizer, tiny_model
from logitmix.tasks import BOXED, BOXED_LINE, Arithmetic, Template


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(Arithmetic.alphabet)


def model(tokenizer, seed):
    torch.manual_seed(seed)
    return tiny_model(len(tokenizer)).eval()


@torch.no_grad()
def naive_margins(model, tokenizer, text_before, opening):
    """One forward pass for each character of the opening."""
    margins = []
    for i, character in enumerate(opening):
        logits = model(torch.tensor([tokenizer(text_before + opening[:i]).input_ids])).logits[0, -1]
        target = tokenizer(character).input_ids[0]
        others = torch.cat([logits[:target], logits[target + 1 :]])
        margins.append((logits[target] - others.max()).item())
    return margins


def test_margins_match_a_pass_for_each_token(tokenizer):
    task, policy = Arithmetic(), model(tokenizer, 0)
    problems = task.problems("validation", 3)
    found = measure_openings(policy, tokenizer, task, problems)
    for opening, problem in zip(found, problems, strict=True):
        expected = naive_margins(policy, tokenizer, task.prompt(problem) + problem.solution, "\n\\boxed{")
        assert opening.tokens == tuple("\n\\boxed{")
        assert opening.margins == pytest.approx(expected, abs=1e-4)


def test_members_of_a_mixture_are_measured_by_their_alpha(tokenizer):
    task, members = Arithmetic(), [model(tokenizer, seed) for seed in (0, 1)]
    mixture = LogitMixForCausalLM.from_members(*members).eval()
    problems = task.problems("validation", 2)
    for alpha, member in zip((0.0, 1.0), members, strict=True):
        alone, mixed = (measure_openings(m, tokenizer, task, problems, **kwargs)
                        for m, kwargs in ((member, {}), (mixture, {"alpha": alpha})))  # fmt: skip
        for x, y in zip(alone, mixed, strict=True):
            assert x.margins == pytest.approx(y.margins, abs=1e-4)


def test_problems_without_solutions_have_no_opening(tokenizer):
    task = Arithmetic()
    problem = task.problems("validation", 1)[0]
    object.__setattr__(problem, "solution", None)
    assert measure_openings(model(tokenizer, 0), tokenizer, task, [problem]) == []


def test_the_sufficient_weight_opens_the_format_and_the_trial_of_the_issue():
    """A base that gives a token 11.3 nats less than its first choice, beside a model that gives it 8.0 more."""
    a, b = [Opening(("\n", "\\"), (0.3, -11.3))], [Opening(("\n", "\\"), (2.3, 8.0))]
    assert opening_weights(a, b) == (pytest.approx(11.3 / 19.3), 1)
    assert opening_weights(b, b) == (0, 1)
    assert opening_weights(a, a) is None
    assert (summarise(a).nats, summarise(a).token) == (-11.3, "\\")
    (note,) = opening_notes(a, b)
    assert "A -11.3 nats at '\\\\', B +2.3 nats at '⏎'." in note
    assert "from a weight of 0.59 for B on; A alone does not" in note
    assert "from a weight of 0.59 for A on; B alone does not" in opening_notes(b, a)[0]
    assert "Both open it" in opening_notes(b, b)[0]
    assert "No weight makes sure" in opening_notes(a, a)[0]


def test_tokens_that_only_the_other_member_writes_bound_the_weight_from_above():
    a, b = [Opening(("\n", "\\"), (-1.0, 4.0))], [Opening(("\n", "\\"), (3.0, -1.0))]
    low, high = opening_weights(a, b)
    assert (low, high) == pytest.approx((1 / 4, 4 / 5))
    for w in (low, high):
        margins = [(1 - w) * m_a + w * m_b for m_a, m_b in zip(a[0].margins, b[0].margins, strict=True)]
        assert min(margins) == pytest.approx(0)
    assert "at weights from" in opening_notes(a, b)[0]
    far = [Opening(("\n", "\\"), (-5.0, 1.0))], [Opening(("\n", "\\"), (5.0, -5.0))]
    assert opening_weights(*far) is None, "each token wants another weight"


def test_a_template_that_gives_the_answer_first_is_opened_at_its_start(tokenizer):
    task = Arithmetic()
    task.template = Template("first", "{question}=", "={answer}\n{solution}", r"=(?P<answer>-?\d+)\n.*")
    problems = task.problems("validation", 2)
    for opening in measure_openings(model(tokenizer, 0), tokenizer, task, problems):
        assert opening.tokens == ("=",)


def test_a_problem_whose_solution_stops_its_response_is_left_out(tokenizer):
    task = Arithmetic()
    task.template = Template("stops", "{question}=", "{solution}\n={answer};", r".*\n=(?P<answer>-?\d+);", stop=(";",))
    first, second = task.problems("validation", 2)
    object.__setattr__(first, "solution", "1;2")
    assert len(measure_openings(model(tokenizer, 0), tokenizer, task, [first, second])) == 1


@pytest.mark.parametrize("seed", range(3))
def test_at_the_sufficient_weight_a_mixture_of_any_logits_ranks_the_token_first(seed):
    logits_a, logits_b = torch.randn(2, 50, generator=torch.Generator().manual_seed(seed)) * 3
    target = int(logits_b.argmax())

    def margin(logits):
        return (logits[target] - torch.cat([logits[:target], logits[target + 1 :]]).max()).item()

    weight, _ = opening_weights([Opening(("x",), (margin(logits_a),))], [Opening(("x",), (margin(logits_b),))])
    for w in (weight + 1e-6, (weight + 1) / 2, 1.0):
        assert ((1 - w) * logits_a + w * logits_b).argmax() == target


def test_every_template_is_tried_and_one_that_the_tokenizer_loses_is_refused(tokenizer):
    task = Arithmetic()
    strict = Template("strict", "{question}=", "{solution}{answer}", r".*?(?P<answer>-?\d+)")
    problems = task.problems("validation", 3)
    line, other, boxed = try_templates(
        model(tokenizer, 0), tokenizer, task, problems, (BOXED_LINE, strict, BOXED), max_new_tokens=5
    )
    assert [len(trial.responses) for trial in (line, other, boxed)] == [3, 3, 0]
    assert line.margin is not None
    assert line.margin.token in "\n\\boxed{"
    assert other.margin is None, "nothing is between solution and answer"
    assert boxed.refusal is not None
    assert "chat template" in boxed.refusal
    assert task.template is BOXED_LINE


def test_check_task_prints_a_row_for_each_template(tokenizer, tmp_path, capsys):
    model(tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    flags = ["--model_name_or_path", str(tmp_path), "--num_questions", "4", "--max_new_tokens", "5"]
    assert main(["check-task", "arithmetic", *flags]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("│ boxed_line "))
    assert [cell.strip() for cell in row.strip("│").split("│")][:5] == ["boxed_line", "0.0", "0.0", "0.0", "100.0"]
    assert "boxed_line: 100 % were cut at 5 tokens: raise --max_new_tokens." in printed
    assert "boxed: refused, since" in printed
    assert printed.endswith("failures: 0\n")
    own = tmp_path / "own.yaml"
    own.write_text(
        'name: boxed_line\nprompt_format: "{question}="\ncompletion_format: "{solution}\\n{answer}"\n'
        "pattern: '(.*\\n)?(?P<answer>-?\\d+)'\n"
    )
    assert main(["check-task", "arithmetic", "--template", str(own), *flags]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ boxed_line ")]
    assert row.split("│")[-2].strip() == "⏎", "of the own template, and not of the shipped one of this name"
