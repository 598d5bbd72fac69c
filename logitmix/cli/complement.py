"""`logitmix complement A [B]`: what two policies get right, together and alone; the paper's tables 1 to 3."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logitmix.cli.options.data import TestProblemArguments
from logitmix.cli.options.evaluation import DecodingArguments
from logitmix.cli.options.model import LoadingArguments, find_model
from logitmix.cli.options.parser import flatten, parse
from logitmix.cli.options.validation import validate_distinct
from logitmix.evaluation.requests import Response
from logitmix.runs.console import console

if TYPE_CHECKING:
    from logitmix.evaluation.openings import Opening

COMPLEMENT_FILE = "complement.json"


@dataclass
class ComplementArguments:
    """Comparison"""

    sources: list[str] = field(
        metadata={
            "help": "Two policies: each a checkpoint, or a file or folder of responses that eval wrote, with :NAME "
            "for one of its members. Or one mixture, whose policy and anchor are compared."
        }
    )


@dataclass
class ComplementOptions:
    comparison: ComplementArguments
    problems: TestProblemArguments
    loading: LoadingArguments
    decoding: DecodingArguments


def main(argv: Sequence[str]) -> None:
    description = "Compare two policies on the same problems: what each gets right, together and alone."
    run(parse("complement", description, ComplementOptions, argv, positional=("sources", "A [B]")))


def run(options: ComplementOptions) -> None:
    from logitmix.evaluation.complement import complement
    from logitmix.evaluation.explanations import explain
    from logitmix.evaluation.openings import summarise
    from logitmix.evaluation.report.tables import opening_notes, print_complement
    from logitmix.evaluation.sources import find_responses, select_pair

    sources = options.comparison.sources
    if len(sources) not in (1, 2):
        raise ValueError(f"{len(sources)} sources are given; a comparison takes one or two")
    validate_distinct(sources, "source")
    sources = [source if find_responses(source) else find_model(source) for source in sources]
    options.comparison.sources = sources
    checkpoints = [source for source in sources if find_responses(source) is None]
    decoded, openings = decode_checkpoints(checkpoints, options) if checkpoints else ({}, {})
    (name_a, a), (name_b, b) = select_pair(sources, decoded)
    result = complement(a, b, name_a, name_b)
    if not checkpoints:
        note_unread(options.problems, options.loading, options.decoding)
    named = [replace(row, name=name) for name, rows in (("A", a), ("B", b)) for row in rows]
    measured = [openings[name] for name in (name_a, name_b) if openings.get(name)]
    margins = {name: asdict(summarise(found)) for name, found in openings.items() if found}
    notes = opening_notes(*measured) if len(measured) == 2 else []
    print_complement(result, name_a, name_b, [*notes, *explain(named)])
    if options.decoding.output_dir is not None:
        path = Path(options.decoding.output_dir) / COMPLEMENT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"a": name_a, "b": name_b} | asdict(result) | {"openings": margins}, indent=2) + "\n"
        )
        console.print(f"The numbers are in {path}.", soft_wrap=True)


def note_unread(*groups: Any) -> None:
    """Say which flags of decoding are not read, where both sources are responses that exist; `output_dir` is read."""
    changed = [f.name for group in groups for f in fields(group) if getattr(group, f.name) != f.default]
    unread = [f"--{name}" for name in changed if name != "output_dir"]
    if unread:
        console.print(
            f"Not read, since the sources are responses, compared as they are: {', '.join(unread)}.", soft_wrap=True
        )


def decode_checkpoints(
    checkpoints: Sequence[str], options: ComplementOptions
) -> tuple[dict[str, list[Response]], dict[str, "list[Opening]"]]:
    """Greedy responses of the checkpoints, and how they open the format of the first problems.

    Both are by source, or by member for a single mixture. One checkpoint is loaded at a time.
    """
    from accelerate import PartialState

    from logitmix.evaluation.decode import get_alphas, make_decoder, weights_to_evaluate
    from logitmix.evaluation.metrics import group_by
    from logitmix.evaluation.openings import NUM_PROBLEMS, measure_openings
    from logitmix.evaluation.requests import make_batches, make_requests
    from logitmix.evaluation.responses import Responses, open_responses
    from logitmix.mixture.loading import load_member, require_tokenizer, validate_same_tokenizer

    args, eval_limit = options.decoding, options.problems.eval_limit
    # before the first is decoded: a second that does not exist must not cost the hours of the first
    validate_same_tokenizer([require_tokenizer(source) for source in checkpoints])
    data_args, task = options.problems.resolve_task(*checkpoints)
    problems = task.problems("test", eval_limit)
    arguments = {"command": "complement"}
    arguments |= flatten(options.comparison, options.problems, data_args, options.loading, args)
    responses: Responses | None = None
    openings: dict[str, list[Opening]] = {}
    for source in checkpoints:
        model = load_member(source, **options.loading.init_kwargs).to(PartialState().device)
        alphas, weights = get_alphas(model), weights_to_evaluate(model) or {}
        if len(options.comparison.sources) == 1:
            if "policy" not in alphas:
                raise ValueError(
                    f"{source} is not a mixture; give a second checkpoint or file of responses to compare it with"
                )
            if "anchor" not in alphas:
                raise ValueError(
                    f"{source} has {len(alphas) - 2} anchors, and a comparison takes two policies: logitmix eval "
                    "--output_dir FOLDER decodes each member, and FOLDER:policy FOLDER:anchor_0 compares two of them"
                )
            alphas = {name: alphas[name] for name in ("policy", "anchor")}
        else:  # a mixture is compared as a whole
            alphas = {source: alphas.get("mixture")}
        tokenizer = require_tokenizer(source)
        decode = make_decoder(model, tokenizer, task, problems, args.max_new_tokens, decoding=args.decoding)
        batches = make_batches(make_requests(alphas, len(problems)), args.batch_size)
        expected = dict.fromkeys(alphas if len(checkpoints) == 1 else checkpoints, len(problems))
        responses = responses or open_responses(args.output_dir, arguments, expected)
        responses.add(f"{Path(source).name} on {task.name}", batches, decode)
        model.eval()
        for name, alpha in alphas.items():
            forward: dict[str, Any] = {"weights": weights[name]} if name in weights else {}
            forward |= {} if alpha is None else {"alpha": alpha}
            openings[name] = measure_openings(model, tokenizer, task, problems[:NUM_PROBLEMS], **forward)
    assert responses is not None
    return group_by(responses.rows, "name"), openings
