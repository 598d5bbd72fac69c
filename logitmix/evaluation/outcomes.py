"""Which problems were right, packed into a few hexadecimal digits for the lines of result files."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from logitmix.evaluation.requests import Response

KEYS = ("format_ok", "answer_ok", "lenient_ok")


def pack(right: Iterable[bool]) -> str:
    """One bit per problem, in order, as hexadecimal digits; the first problem is the highest bit of the first digit.

    >>> pack([True, False, False, True, True])
    '98'
    """
    return np.packbits(np.fromiter(right, dtype=bool)).tobytes().hex()


def unpack(digits: str, n: int) -> NDArray[np.bool_]:
    """The outcomes `[n]` of n problems, as `pack` wrote them. Raises `ValueError` if it wrote another number."""
    packed = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
    if len(packed) != -(-n // 8):
        raise ValueError(f"{digits[:20]!r}… holds {8 * len(packed)} bits, which are not those of {n} problems")
    return np.unpackbits(packed, count=n).astype(bool)


def pack_outcomes(responses: Iterable[Response]) -> dict[str, str]:
    """`format_ok`, `answer_ok` and `lenient_ok` of graded responses, one per problem, packed in their order."""
    ordered = sorted(responses, key=lambda response: response.problem)
    return {key: pack(getattr(response, key) for response in ordered) for key in KEYS}
