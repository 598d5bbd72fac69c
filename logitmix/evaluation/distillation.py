"""What a student keeps of its mixture: both, and what the mixture is made of, on the same held-out problems.

Shape legend: T tokens of a response, V vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitmix.evaluation.complement import Complement, complement
from logitmix.evaluation.decode import Decoder, get_alphas, make_decoder
from logitmix.evaluation.inspect import token_text
from logitmix.evaluation.metrics import group_by
from logitmix.evaluation.requests import Response, make_batches, make_requests
from logitmix.evaluation.responses import open_responses
from logitmix.loss_head.divergence import kl
from logitmix.mixture.merging import MERGED
from logitmix.mixture.modeling import LogitMixForCausalLM
from logitmix.mixture.scoring import following_prompts
from logitmix.runs.console import console
from logitmix.runs.folder import read_last_start
from logitmix.tasks import Problem, Task
from logitmix.training.students import build_student

STUDENT, MIXTURE = "student", "mixture"
WORST = 20  # tokens that are shown
_CONTEXT = 40  # characters before one


@dataclass(frozen=True)
class WorstToken:
    """A token where student and mixture differ much, and what each of the two ranks first there.

    `position` counts the response's tokens from 0.
    """

    kl: float
    problem: int
    position: int
    before: str
    token: str
    mixture: str
    student: str


@dataclass(frozen=True)
class TokenComparison:
    """Student and mixture at each token of the responses of one of the two.

    `kl` is the mean of KL(mixture ‖ student) in nats, at temperature 1, and `agreement` the share of tokens at which
    both rank the same token first.
    """

    responses_of: str
    tokens: int
    kl: float
    agreement: float
    worst: tuple[WorstToken, ...]


def decode_student(
    student: PreTrainedModel,
    mixture: LogitMixForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    problems: Sequence[Problem],
    output_dir: str,
    arguments: Mapping[str, Any],
    max_new_tokens: int | None = None,
    batch_size: int = 64,
) -> list[Response]:
    """Greedy responses of the student, the mixture, its members, and their merged weights.

    Written into the folder as they are decoded; a later start continues. There are no merged weights of several
    anchors, of members of different shapes, and at weights that no alpha gives.
    """
    alphas, models = get_alphas(mixture), compared_models(student, mixture)
    expected = dict.fromkeys([*models, *alphas], len(problems))
    responses = open_responses(output_dir, arguments, expected)

    def decoder(model: PreTrainedModel) -> Decoder:
        return make_decoder(model, tokenizer, task, problems, max_new_tokens)

    for name, model in models.items():
        responses.add(name, make_batches(make_requests({name: None}, len(problems)), batch_size), decoder(model))
    batches = make_batches(make_requests(alphas, len(problems)), batch_size)
    responses.add("mixture and members", batches, decoder(mixture))
    return responses.rows


def set_aside_other_report(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Move a report with other arguments, as of an earlier step of a run that was resumed, to `report-<time>`."""
    start = read_last_start(folder)
    if start is None or start["arguments"] == json.loads(json.dumps(arguments, default=str)):
        return
    aside = folder.with_name(f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder.rename(aside)
    console.print(f"The report of step {start['arguments'].get('step')} is now in {aside}.", soft_wrap=True)


def compared_models(student: PreTrainedModel, mixture: LogitMixForCausalLM) -> dict[str, PreTrainedModel]:
    """The student and, where members can be merged, the model of their merged weights."""
    models = {STUDENT: student}
    with suppress(ValueError):  # see `decode_student`
        models[MERGED] = build_student(mixture, MERGED).eval()
    return models


def compare_with_student(responses: Sequence[Response]) -> dict[str, Complement]:
    """For each other model, its responses (a) against the student's (b); the mixture first."""
    groups = group_by(responses, "name")
    names = sorted((name for name in groups if name != STUDENT), key=lambda name: name != MIXTURE)
    return {name: complement(groups[name], groups[STUDENT], name, STUDENT) for name in names}


def verdict(c: Complement) -> str:
    """Whether the student keeps the mixture's accuracy, from its paired interval. `c.b` is the student."""
    gap = c.answer.b_minus_a
    ends = f"{100 * gap.value:+.1f} points, interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f}, {c.n} problems"
    if gap.high < 0:
        return f"The student does not keep the mixture's accuracy at 95 % ({ends})."
    # the interval holds every difference that the test does not reject
    margin = max(abs(gap.low), abs(gap.high))
    return f"The student keeps the mixture's accuracy within ± {100 * margin:.1f} points at 95 % ({ends})."


@torch.no_grad()
def compare_tokens(
    student: PreTrainedModel,
    mixture: LogitMixForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    responses: Sequence[Response],
    prompt_ids: Sequence[list[int]],
) -> TokenComparison:
    """Compare the two at each token of responses, whose texts are encoded again, without their end tokens.

    `prompt_ids` are those of each problem. Raises `ValueError` where no response has a token.
    """
    total, agreeing, tokens = 0.0, 0, 0
    worst: list[WorstToken] = []
    base = student.get_base_model() if is_peft_model(student) else student
    was_training = base.training
    base.eval()
    V = mixture.config.vocab_size
    for response in responses:
        ids = tokenizer(response.response, add_special_tokens=False)["input_ids"]
        if not ids:
            continue
        text = torch.tensor([prompt_ids[response.problem] + ids], device=mixture.device)
        logits = [
            model(input_ids=text, attention_mask=torch.ones_like(text), **following_prompts(model, len(ids))).logits[
                0, -len(ids) - 1 : -1, :V
            ]
            for model in (mixture, base)
        ]
        log_t_TV, log_s_TV = (z.float().log_softmax(-1) for z in logits)
        kl_T = kl(log_t_TV, log_s_TV)
        firsts = [z.argmax(-1).tolist() for z in logits]
        total += kl_T.sum().item()
        agreeing += sum(a == b for a, b in zip(*firsts, strict=True))
        tokens += len(ids)
        for t in kl_T.topk(min(WORST, len(ids))).indices.tolist():
            before = tokenizer.decode(ids[:t])[-_CONTEXT:]
            names = [token_text(tokenizer, i) for i in (ids[t], firsts[0][t], firsts[1][t])]
            worst.append(WorstToken(kl_T[t].item(), response.problem, t, before, *names))
        worst = sorted(worst, key=lambda token: -token.kl)[:WORST]
    base.train(was_training)
    if not tokens:
        raise ValueError("no response has a token, so student and mixture cannot be compared")
    return TokenComparison(responses[0].name, tokens, total / tokens, agreeing / tokens, tuple(worst))
