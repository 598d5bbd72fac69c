"""Every decision that docs/verifier.md lists is what the verifier does."""

import re

import pytest

from logitmix.tasks import answers_match
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs" / "verifier.md"
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)


def test_there_are_rows():
    assert len(ROWS) > 60


@pytest.mark.parametrize(("prediction", "gold", "match"), ROWS, ids=[" ~ ".join(row[:2]) for row in ROWS])
def test_the_table_is_true(prediction, gold, match):
    assert answers_match(prediction, gold) == (match == "yes")
