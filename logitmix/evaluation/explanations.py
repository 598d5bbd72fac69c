"""Why rates are low, in words: a template that is not followed, responses that are cut. Pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from logitmix.evaluation.metrics import Rates, group_by, rates
from logitmix.evaluation.requests import Response
from logitmix.evaluation.statistics import CONFIDENCE, mcnemar_exact

CUT = 0.1  # the share of cut responses above which the limit is named

# In per cent; several alphas of one mix share a line, with the range of each field
NOT_FOLLOWED = "{format} % in the format, {without} % right without it: the template is not followed"
ELSEWHERE = (
    "{format} % in the format, {answer} % right in it and {lenient} % anywhere in the text: the answer is not where "
    "the template asks for it"
)
NEVER_RIGHT = "{format} % in the format, and no answer is right"
NOTHING = "no response is in the format, and none is right without it"
TRUNCATED = "{truncated} % were cut at {limit} tokens: raise --max_new_tokens"


@dataclass(frozen=True)
class Finding:
    """A sentence that explains the rates of a group of responses.

    without: the share that is right without the format
    limit:   the length in tokens at which responses were cut
    """

    sentence: str
    rates: Rates
    without: float
    limit: int


def explain(responses: Iterable[Response]) -> list[str]:
    """A line for each name and cause, of low rates that have one: `"policy: 82 % were cut at 96 tokens: …"`.

    Where several alphas of a name have the same cause, one line has all of them.
    """
    lines = []
    for name, of_name in group_by(responses, "name").items():
        by_alpha = group_by(of_name, "alpha")
        found: dict[str, dict[float | None, Finding]] = {}
        for alpha, group in by_alpha.items():
            for finding in findings(group):
                found.setdefault(finding.sentence, {})[alpha] = finding
        for sentence, by_cause in found.items():
            at = f" at {', '.join(f'{alpha:g}' for alpha in sorted(by_cause) if alpha is not None)}"  # type: ignore[type-var]
            who = name + (at if len(by_alpha) > 1 else "")
            lines.append(f"{who}: {_filled(sentence, list(by_cause.values()))}.")
    return lines


def findings(responses: Sequence[Response]) -> list[Finding]:
    """What explains the rates of responses of one model at one alpha; empty for rates that explain themselves."""
    r = rates(responses)
    only_lenient = sum(response.lenient_ok and not response.answer_ok for response in responses)
    only_strict = sum(response.answer_ok and not response.lenient_ok for response in responses)
    is_beyond_noise = only_lenient > only_strict and mcnemar_exact(only_strict, only_lenient) < 1 - CONFIDENCE
    sentences = []
    if is_beyond_noise or (r.answer == 0 and r.lenient > 0):
        sentences.append(NOT_FOLLOWED if r.format < 0.5 else ELSEWHERE)
    elif r.answer == 0:
        sentences.append(NEVER_RIGHT if r.format > 0 else NOTHING)
    if r.truncated >= CUT:
        sentences.append(TRUNCATED)
    without = sum(response.lenient_ok and not response.format_ok for response in responses) / len(responses)
    limit = max((response.length for response in responses if response.truncated), default=0)
    return [Finding(sentence, r, without, limit) for sentence in sentences]


def _filled(sentence: str, causes: Sequence[Finding]) -> str:
    shares = {key: [100 * getattr(cause.rates, key) for cause in causes] for key in ("format", "answer", "lenient")}
    shares["truncated"] = [100 * cause.rates.truncated for cause in causes]
    shares["without"] = [100 * cause.without for cause in causes]
    spans = {key: _span(values) for key, values in shares.items()}
    return sentence.format(**spans, limit=max(cause.limit for cause in causes))


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"
