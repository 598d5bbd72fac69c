"""An evaluation's folder: what was asked for, and every response, a line each, added batch by batch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from logitmix.evaluation.decode import Decode, Request
from logitmix.runs.console import console, progress_bar
from logitmix.runs.files import RESPONSES_FILE, RUN_FILE, append_jsonl, read_jsonl
from logitmix.runs.folder import find_run_or_model, record_start, validate_same_arguments

# May differ between an evaluation and its continuation: it is how a batch is made to fit into memory
IGNORED_ARGUMENTS = {"batch_size"}


class Responses:
    """The responses so far, `rows`; in a file as well, where there is one, from which a later start goes on."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._earlier = read_jsonl(path) if path is not None and path.exists() else []

    def add(self, title: str, batches: Sequence[Sequence[Request]], decode: Decode) -> None:
        """Add the responses to the batches; those that the file holds already are not decoded again.

        A batch of which the file holds a part is decoded as a whole, so that samples do not depend on an interruption.
        Raises `ValueError` where the file's next lines answer other requests.
        """
        done = 0
        for batch in batches:
            earlier = self._earlier[len(self.rows) : len(self.rows) + len(batch)]
            for row, request in zip(earlier, batch, strict=False):
                if any(row.get(key) != value for key, value in asdict(request).items()):
                    raise ValueError(
                        f"{self.path} holds a response of {row.get('name')!r} to problem {row.get('problem')} where "
                        f"this evaluation has {request.name!r} and {request.problem}; choose another --output_dir"
                    )
            if len(earlier) < len(batch):
                break
            self.rows += earlier
            done += 1
        if done == len(batches):
            return
        if self.path is not None and self.path.exists():
            self._cut_after(len(self.rows))
        self._earlier = []
        total = sum(len(batch) for batch in batches)
        with progress_bar() as bar:
            left = sum(len(batch) for batch in batches[done:])
            shown = bar.add_task(title, total=total, completed=total - left, info="")
            try:
                for responses in decode(batches[done:]):
                    lines = [asdict(response) for response in responses]
                    if self.path is not None:
                        append_jsonl(self.path, lines)
                    self.rows += lines
                    bar.advance(shown, len(lines))
            except KeyboardInterrupt:
                if self.path is not None:
                    console.print(
                        f"{len(self.rows)} responses are in {self.path}; the same command goes on from there."
                    )
                raise

    def _cut_after(self, lines: int) -> None:
        """Drop what the file holds after so many lines: a batch, or a line, that was not finished."""
        assert self.path is not None
        with self.path.open("r+b") as file:
            for _ in range(lines):
                file.readline()
            file.truncate(file.tell())


def open_responses(output_dir: str | None, arguments: Mapping[str, Any]) -> Responses:
    """The responses in the folder of an evaluation, begun or continued; without a folder they are in no file.

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
    record_start(output_dir, arguments)
    return Responses(folder / RESPONSES_FILE)
