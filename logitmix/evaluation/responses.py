"""The folder of an evaluation: its arguments, and every response as a line, added as it is decoded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from accelerate import PartialState

from logitmix.evaluation.decode import Decode, Decoder
from logitmix.evaluation.requests import Request, Response
from logitmix.runs.console import console, progress_bar
from logitmix.runs.files import RESPONSES_FILE, RUN_FILE, append_jsonl, read_jsonl
from logitmix.runs.folder import find_run_or_model, read_last_start, record_start, validate_same_arguments

# Arguments that may change when an evaluation is continued: they fit a batch into memory
IGNORED_ARGUMENTS = {"batch_size"}
FIELD_TYPES = get_type_hints(Response)


class Responses:
    """The responses so far, `rows`; with a file, they are also written there, and a later start continues from it.

    A response is written as soon as its sequence and all before it have ended, so that the file is at any time the
    beginning of the whole one.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[Response] = []
        self._earlier = read_responses(path) if path is not None and path.exists() else []

    def add(self, title: str, batches: Sequence[Sequence[Request]], decode: Decode) -> None:
        """Add the responses to the batches, without decoding those that the file holds already.

        A batch that the file holds in part is decoded again as a whole, so that samples do not depend on an
        interruption, and what is missing of it is added. A `Decoder` adds each response as it is decoded, another
        function each batch. Raises `ValueError` where the next lines of the file are for other requests.
        """
        done, started = self._add_earlier(batches)
        if done == len(batches):
            return
        if self.path is not None and self.path.exists():
            self._cut_after(len(self.rows))
        self._earlier = []
        total, left = sum(map(len, batches)), sum(map(len, batches[done:])) - started
        with progress_bar() as bar:
            shown = bar.add_task(title, total=total, completed=total - left, info="")
            batch = _Batch(started, self._write, lambda: bar.advance(shown))
            if isinstance(decode, Decoder):
                decode = partial(decode, on_response=lambda *response: batch.take(*response))
            try:
                for responses in decode(batches[done:]):
                    batch.finish(responses)
                    batch = _Batch(0, self._write, lambda: bar.advance(shown))
            except KeyboardInterrupt:
                if self.path is not None:
                    console.print(f"{len(self.rows)} responses are in {self.path}; repeat the command to continue.")
                raise

    def _add_earlier(self, batches: Sequence[Sequence[Request]]) -> tuple[int, int]:
        """Take over what the file holds of the batches; the numbers of whole batches, and of responses to the next."""
        for done, batch in enumerate(batches):
            earlier = self._earlier[len(self.rows) : len(self.rows) + len(batch)]
            for response, request in zip(earlier, batch, strict=False):
                if any(getattr(response, key) != value for key, value in asdict(request).items()):
                    raise ValueError(
                        f"{self.path} holds a response of {response.name!r} to problem {response.problem} where this "
                        f"evaluation has {request.name!r} and {request.problem}; choose another --output_dir"
                    )
            self.rows += earlier
            if len(earlier) < len(batch):
                return done, len(earlier)
        return len(batches), 0

    def _write(self, response: Response) -> None:
        if self.path is not None:
            append_jsonl(self.path, [asdict(response)])
        self.rows.append(response)

    def _cut_after(self, lines: int) -> None:
        """Truncate the file after this many lines: the rest is an unfinished batch or line."""
        assert self.path is not None
        with self.path.open("r+b") as file:
            for _ in range(lines):
                file.readline()
            file.truncate(file.tell())


class _Batch:
    """The responses of one batch, which end in any order and are written in the order of the requests.

    The first `written` of them are written already.
    """

    def __init__(self, written: int, write: Callable[[Response], None], count: Callable[[], None]) -> None:
        self.earlier = self.written = written
        self._write, self._count = write, count
        self._waiting: dict[int, Response] = {}

    def take(self, index: int, response: Response) -> None:
        if index < self.earlier:
            return
        self._waiting[index] = response
        self._count()
        while self.written in self._waiting:
            self._write(self._waiting.pop(self.written))
            self.written += 1

    def finish(self, responses: Sequence[Response]) -> None:
        for index in range(self.written, len(responses)):  # of a decoder that does not report them singly
            self.take(index, responses[index])


def read_responses(path: Path) -> list[Response]:
    """The responses in a file that an evaluation wrote.

    Raises `ValueError`, with file and line, for a line with missing or unknown fields, or a value of another type.
    """
    responses = []
    for number, row in enumerate(read_jsonl(path), start=1):
        problem = _problem_with(row)
        if problem is not None:
            raise ValueError(f"line {number} of {path} is not a response: {problem}; give a file that eval wrote")
        responses.append(Response(**row))
    return responses


def _problem_with(row: Any) -> str | None:
    """Why the row is not a response, or None if it is one."""
    if not isinstance(row, dict):
        return "it is not a JSON object"
    for name, expected in FIELD_TYPES.items():
        if name not in row:
            return f"it has no {name!r}"
        accepted = get_args(expected) or (expected,)
        # not isinstance, which takes True for an int; JSON may hold a float as an int
        if type(row[name]) not in accepted and not (type(row[name]) is int and float in accepted):
            return f"its {name!r} is {row[name]!r}"[:80]
    unknown = [name for name in row if name not in FIELD_TYPES]
    return f"it has an unknown field {unknown[0]!r}" if unknown else None


def open_responses(
    output_dir: str | None, arguments: Mapping[str, Any], expected: Mapping[str, int] | None = None
) -> Responses:
    """Start or continue an evaluation in a folder; without a folder, responses are kept in memory only.

    `expected` is the number of responses of each name, which `run.jsonl` records: the file of an interrupted
    evaluation has fewer (`expected_responses`).

    Raises `ValueError` for a folder that holds something else, or an evaluation with other arguments.
    """
    if output_dir is None:
        return Responses()
    if PartialState().num_processes > 1:
        raise ValueError(
            f"{PartialState().num_processes} processes would write into one {output_dir}; evaluate in one, without "
            "torchrun or accelerate launch"
        )
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{output_dir} is a file; --output_dir must be a folder")
    if (folder / RUN_FILE).exists():
        validate_same_arguments(folder, arguments, IGNORED_ARGUMENTS)
    else:
        found = find_run_or_model(folder, RESPONSES_FILE)
        if found is not None:
            raise ValueError(f"{output_dir} holds something else ({found}); choose another --output_dir")
    record_start(output_dir, arguments, responses=dict(expected or {}))
    return Responses(folder / RESPONSES_FILE)


def expected_responses(path: Path) -> dict[str, int]:
    """The number of responses of each name in a whole file; empty if the evaluation's `run.jsonl` is not beside it."""
    start = read_last_start(path.parent) if path.name == RESPONSES_FILE else None
    return (start or {}).get("responses") or {}
