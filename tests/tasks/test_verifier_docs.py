"""The verifier decides every case in docs/verifier.md as the page says."""

import re

import pytest

from logitmix.tasks import answers_match
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs" / "verifier.md"
TABLE = DOCS.read_text(encoding="utf-8").replace(r"\|", "|")  # a bar in a table is escaped
ROWS = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (yes|no) \|", TABLE, re.MULTILINE)


def test_the_table_has_rows():
    assert len(ROWS) > 60


@pytest.mark.parametrize(("prediction", "gold", "match"), ROWS, ids=[" ~ ".join(row[:2]) for row in ROWS])
def test_the_verifier_agrees_with_the_table(prediction, gold, match):
    assert answers_match(prediction, gold) == (match == "yes")
