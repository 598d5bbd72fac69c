"""The policies that a comparison names: checkpoints, or responses that `logitmix eval` wrote, by member."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from logitmix.evaluation.decode import Response
from logitmix.evaluation.metrics import group_by
from logitmix.evaluation.responses import read_responses, validate_is_whole
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
        by_name = decoded or group_by(_read(source)[0], "name")
        if not {"policy", "anchor"} <= by_name.keys():
            raise ValueError(
                f"{source} holds responses of {', '.join(by_name)}, not of policy and anchor; compare two of them as "
                f"{source}:NAME {source}:NAME"
            )
        for name in ("policy", "anchor") if not decoded else ():
            _validate_is_whole(source, name, by_name[name])
        return [(name, by_name[name]) for name in ("policy", "anchor")]
    return [(source, decoded[source] if source in decoded else _select(source)) for source in sources]


def _select(source: str) -> list[Response]:
    """The responses of the member that a source names, or of the only one in its file."""
    responses, name = _read(source)
    by_name = group_by(responses, "name")
    if name is None and len(by_name) > 1:
        raise ValueError(
            f"{source} holds responses of {', '.join(by_name)}; choose one, as {source}:{next(iter(by_name))}"
        )
    if name is not None and name not in by_name:
        raise ValueError(f"{source} names {name!r}, but the file holds responses of {', '.join(by_name)}")
    name = name or next(iter(by_name))
    _validate_is_whole(source, name, by_name[name])
    return by_name[name]


def _validate_is_whole(source: str, name: str, responses: Sequence[Response]) -> None:
    found = find_responses(source)
    assert found is not None
    validate_is_whole(found[0], name, responses)


def _read(source: str) -> tuple[list[Response], str | None]:
    found = find_responses(source)
    assert found is not None
    path, name = found
    responses = read_responses(path)
    if not responses:
        raise ValueError(f"{path} holds no responses; evaluate first, with logitmix eval --output_dir")
    return responses, name
