"""Graded responses for tests of what is computed from them."""

from logitmix.evaluation.requests import Response


def make_response(**fields) -> Response:
    """A response with the given fields; by default a right answer of the policy to problem 0."""
    values = {
        "name": "policy", "alpha": 0.0, "problem": 0, "sample": 0, "prompt": "question", "response": "answer",
        "gold": "1", "format_ok": True, "answer_ok": True, "lenient_ok": True, "length": 1, "truncated": False,
    }  # fmt: skip
    return Response(**values | fields)
