"""Greedy evaluation of policy, anchor and mixture on test problems while they are trained."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from accelerate.utils import gather_object

from logitmix.evaluation.decode import BATCH_SIZE, get_alphas, greedy_responses
from logitmix.evaluation.metrics import group_by, rates
from logitmix.evaluation.outcomes import pack_outcomes
from logitmix.evaluation.requests import Response
from logitmix.runs.files import EVALUATION_RESPONSES_FILE, EVALUATIONS_FILE, append_jsonl
from logitmix.runs.trackers import log_to_trackers
from logitmix.tasks import Problem, Task
from logitmix.training.grpo import LogitMixGRPOTrainer
from logitmix.training.process_shares import process_share


def evaluate_members(
    trainer: LogitMixGRPOTrainer, task: Task, problems: Sequence[Problem], folder: Path
) -> Callable[[int], None]:
    """Return a function of the step that evaluates the members and the mixture, or the model if there is no anchor.

    It appends a line for each to `evaluations.jsonl` in the folder, with the rates and which problems were right
    (`evaluation.outcomes.unpack`), and logs the rates to the trackers. The anchor is decoded once, unless
    `reanchor_steps` replaces it. Each response is a line of `evaluation_responses.jsonl` as soon as it is decoded; of
    the process with index i > 0, in `evaluation_responses-i.jsonl`.

    Processes share the problems. Each decodes equally many, because sharded weights are gathered by all processes
    together; a problem that is decoded twice for this reason counts once.
    """
    task = copy.copy(task)
    task.chat_template_kwargs = trainer.chat_template_kwargs  # prompts as in the rollouts
    share = process_share(len(problems), trainer.accelerator)
    mine = [problems[i % len(problems)] for i in share]
    batch_size = trainer.args.rollout_batch_size or BATCH_SIZE
    anchor: list[Response] = []
    moves = trainer.args.reanchor_steps is not None  # then the anchor is decoded each time
    rank = trainer.accelerator.process_index
    file = folder / (EVALUATION_RESPONSES_FILE if rank == 0 else f"evaluation_responses-{rank}.jsonl")

    def numbered(response: Response) -> Response:
        return replace(response, problem=share[response.problem])

    def evaluate(step: int) -> None:
        def save(_: int, response: Response) -> None:
            if numbered(response).problem < len(problems):
                append_jsonl(file, [{"step": step} | asdict(numbered(response))])

        names = {
            name: alpha for name, alpha in get_alphas(trainer.model).items() if name != "anchor" or not anchor or moves
        }
        with trainer.generation_model() as model:
            responses = greedy_responses(
                model, trainer.processing_class, task, mine, names, trainer.max_completion_length, batch_size, save,
                trainer.args.decoding,
            )  # fmt: skip
        own = map(numbered, responses)
        gathered: list[Response] = gather_object([response for response in own if response.problem < len(problems)])
        by_name = group_by(gathered, "name")
        if moves:
            anchor.clear()
        anchor.extend(by_name.pop("anchor", []))
        if anchor:
            by_name["anchor"] = anchor
        if trainer.is_world_process_zero():
            found = {name: asdict(rates(group)) for name, group in by_name.items()}
            lines = [
                {"step": step, "name": name} | found[name] | pack_outcomes(group) for name, group in by_name.items()
            ]
            append_jsonl(folder / EVALUATIONS_FILE, lines)
            log_to_trackers(trainer, found)

    return evaluate
