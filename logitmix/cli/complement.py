"""`logitmix complement A B`: what two policies get right, together and alone (the paper's tables 1 to 3)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from logitmix.cli.options.data import TestProblemArguments
from logitmix.cli.options.evaluation import DecodingArguments
from logitmix.cli.options.model import LoadingArguments
from logitmix.cli.options.parser import parse
from logitmix.cli.options.validation import validate_distinct
from logitmix.evaluation.complement import complement
from logitmix.evaluation.decode import decoder, in_batches, members_of, requests_for
from logitmix.evaluation.report.tables import print_complement
from logitmix.evaluation.responses import Responses, open_responses
from logitmix.mixture.loading import load_member, require_tokenizer, validate_same_tokenizer
from logitmix.runs.files import RESPONSES_FILE, read_jsonl
from logitmix.runs.folder import console

COMPLEMENT_FILE = "complement.json"

Rows = list[dict[str, Any]]


@dataclass
class ComplementArguments:
    """The two policies to compare."""

    sources: list[str] = field(
        metadata={
            "help": "Two sources, each a checkpoint, or a file or folder of responses that eval wrote, with :NAME for "
            "one of its members. Or one mixture, whose policy and anchor are compared."
        }
    )


def main(argv: Sequence[str]) -> None:
    first_flag = next((i for i, argument in enumerate(argv) if argument.startswith("-")), len(argv))
    if first_flag:
        argv = ["--sources", *argv]
    compared, asked, loading, args = parse(
        "logitmix complement A [B]",
        "What two policies get right, together and alone.",
        (ComplementArguments, TestProblemArguments, LoadingArguments, DecodingArguments),
        argv,
    )
    if len(compared.sources) not in (1, 2):
        raise ValueError(f"{len(compared.sources)} sources are given; give one or two to compare")
    validate_distinct(compared.sources, "source")
    checkpoints = [source for source in compared.sources if _responses_of(source) is None]
    decoded: dict[str, Rows] = {}
    if checkpoints:
        decoded = evaluate(checkpoints, len(compared.sources) == 1, compared, asked, loading, args)
    (name_a, a), (name_b, b) = _pair(compared.sources, decoded)
    result = complement(a, b, name_a, name_b)
    print_complement(result, name_a, name_b)
    if args.output_dir is not None:
        path = Path(args.output_dir) / COMPLEMENT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"a": name_a, "b": name_b} | asdict(result), indent=2) + "\n")
        console.print(f"The numbers are in {path}.", soft_wrap=True)


def evaluate(
    checkpoints: Sequence[str],
    alone: bool,
    compared: ComplementArguments,
    asked: TestProblemArguments,
    loading: LoadingArguments,
    args: DecodingArguments,
) -> dict[str, Rows]:
    """Greedy responses of the checkpoints, one loaded at a time; of one alone, those of its policy and its anchor."""
    # before anything is decoded: a missing second checkpoint must not cost the hours of the first
    validate_same_tokenizer([require_tokenizer(source) for source in checkpoints])
    data_args = asked.resolve(*checkpoints)
    task = data_args.load()
    problems = task.problems("test", asked.eval_limit)
    given = [vars(group) for group in (compared, asked, data_args, loading, args)]
    arguments = {"command": "complement"} | {key: value for group in given for key, value in group.items()}
    responses: Responses | None = None
    for source in checkpoints:
        model = load_member(source, **loading.init_kwargs).to(PartialState().device)
        alphas = members_of(model)
        if alone:
            if "anchor" not in alphas:
                raise ValueError(
                    f"{source} is no mixture; give a second checkpoint or file of responses to compare it with"
                )
            alphas = {name: alphas[name] for name in ("policy", "anchor")}
        else:  # a mixture is compared as the mixture
            alphas = {source: alphas.get("mixture")}
        decode = decoder(model, require_tokenizer(source), task, problems, args.max_new_tokens)
        batches = in_batches(requests_for(alphas, len(problems)), args.batch_size)
        responses = responses or open_responses(args.output_dir, arguments)
        responses.add(f"{Path(source).name} on {task.name}", batches, decode)
    assert responses is not None
    return _by_name(responses.rows)


def _pair(sources: Sequence[str], decoded: dict[str, Rows]) -> list[tuple[str, Rows]]:
    """The names and responses of the two policies to compare."""
    if len(sources) == 1:
        (source,) = sources
        held = decoded or _by_name(_read(source)[0])
        if not {"policy", "anchor"} <= held.keys():
            raise ValueError(
                f"{source} holds responses of {', '.join(held)}, not of policy and anchor; compare two of them as "
                f"{source}:NAME {source}:NAME"
            )
        return [(name, held[name]) for name in ("policy", "anchor")]
    pair = []
    for source in sources:
        if source in decoded:
            pair.append((source, decoded[source]))
            continue
        rows, name = _read(source)
        held = _by_name(rows)
        if name is None and len(held) > 1:
            raise ValueError(
                f"{source} holds responses of {', '.join(held)}; say which, as {source}:{next(iter(held))}"
            )
        if name is not None and name not in held:
            raise ValueError(f"{source} names {name!r}, but the file holds responses of {', '.join(held)}")
        pair.append((source, held[name or next(iter(held))]))
    return pair


def _read(source: str) -> tuple[Rows, str | None]:
    found = _responses_of(source)
    assert found is not None
    path, name = found
    rows = read_jsonl(path)
    if not rows:
        raise ValueError(f"{path} holds no responses; evaluate first, with logitmix eval --output_dir")
    missing = [
        key
        for key in ("name", "problem", "prompt", "gold", "format_ok", "answer_ok", "lenient_ok")
        if key not in rows[0]
    ]
    if missing:
        raise ValueError(f"{path} holds no responses: its lines have no {missing[0]!r}; give a file that eval wrote")
    return rows, name


def _responses_of(source: str) -> tuple[Path, str | None] | None:
    """The file of responses that a source names, and the member of it; None for a checkpoint.

    Raises `ValueError` for a member of a folder that holds no responses.
    """
    head, _, tail = source.rpartition(":")
    for path, name in ((source, None), (head, tail)):
        if path and Path(path).is_file():
            return Path(path), name
        if path and (Path(path) / RESPONSES_FILE).is_file():
            return Path(path) / RESPONSES_FILE, name
    if head and Path(head).is_dir() and not Path(source).is_dir():
        raise ValueError(
            f"{source} names {tail!r} of the responses in {head}, but there are none; evaluate first, with logitmix "
            f"eval --output_dir, or give {head} alone"
        )
    return None


def _by_name(rows: Rows) -> dict[str, Rows]:
    held: dict[str, Rows] = {}
    for row in rows:
        held.setdefault(row["name"], []).append(row)
    return held
