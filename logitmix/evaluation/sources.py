"""The policies that a comparison names: checkpoints, or responses that `logitmix eval` wrote, by member."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from logitmix.evaluation.metrics import group_by
from logitmix.evaluation.requests import Response
from logitmix.evaluation.responses import expected_responses, read_responses
from logitmix.runs.files import RESPONSES_FILE


def find_responses(source: str) -> tuple[Path, str | None] | None:
    """The file of responses that a source names, and the member after its colon; None for a checkpoint.

    Raises `ValueError` for a member of a folder without responses.
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


def select_pair(sources: Sequence[str], decoded: Mapping[str, list[Response]]) -> list[tuple[str, list[Response]]]:
    """The names and responses of the two policies to compare.

    `decoded` has the responses of checkpoints, by source, or by member if a single checkpoint is given. The others
    are read from their files.
    """
    if len(sources) == 1:
        (source,) = sources
        by_name = decoded or _read(source)[0]
        if not {"policy", "anchor"} <= by_name.keys():
            raise ValueError(
                f"{source} holds responses of {', '.join(by_name)}, not of policy and anchor; compare two of them as "
                f"{source}:NAME {source}:NAME"
            )
        return [(name, by_name[name] if decoded else _whole(source, name)) for name in ("policy", "anchor")]
    return [(source, decoded[source] if source in decoded else _select(source)) for source in sources]


def _select(source: str) -> list[Response]:
    """The responses of the member that a source names, or of the only one in its file."""
    by_name, name = _read(source)
    if name is None and len(by_name) > 1:
        raise ValueError(
            f"{source} holds responses of {', '.join(by_name)}; choose one, as {source}:{next(iter(by_name))}"
        )
    if name is not None and name not in by_name:
        raise ValueError(f"{source} names {name!r}, but the file holds responses of {', '.join(by_name)}")
    return _whole(source, name or next(iter(by_name)))


def _whole(source: str, name: str) -> list[Response]:
    """The responses of a member. Raises `ValueError` if the evaluation was interrupted before their last."""
    path, responses = _file(source)[0], _read(source)[0][name]
    expected = expected_responses(path).get(name, 0)
    if len(responses) < expected:
        raise ValueError(
            f"{path} holds {len(responses)} of {expected} responses of {name!r}: its evaluation was interrupted; "
            "repeat its command, which continues it"
        )
    return responses


def _read(source: str) -> tuple[dict[str, list[Response]], str | None]:
    """The responses in a source's file by member, also of members that are still to be decoded, and whom it names."""
    path, name = _file(source)
    responses = read_responses(path)
    if not responses:
        raise ValueError(f"{path} holds no responses; evaluate first, with logitmix eval --output_dir")
    return {expected: [] for expected in expected_responses(path)} | group_by(responses, "name"), name


def _file(source: str) -> tuple[Path, str | None]:
    found = find_responses(source)
    assert found is not None
    return found
