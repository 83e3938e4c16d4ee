"""The house: few rooms, each module says what it is for, and one name has one home."""

import ast
from collections import Counter

import pytest

from rlaifv import ROOT

HOUSE = ROOT / "rlaifv"
MODULES = sorted(path for path in HOUSE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def test_a_reader_sees_at_most_twenty_rooms_and_files():
    seen = [path for path in HOUSE.iterdir() if path.name not in ("__pycache__", "__init__.py", "__main__.py")]
    assert len(seen) <= 20, sorted(path.name for path in seen)


@pytest.mark.parametrize("path", sorted(HOUSE.rglob("*.py")), ids=lambda p: str(p.relative_to(HOUSE)))
def test_a_module_says_in_its_first_sentence_what_it_is_for(path):
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].rstrip()
    assert first and first[-1] in ".:)?]" and len(first) < 400


def test_two_modules_have_one_name_only_where_one_is_the_others_command():
    twice = {name for name, count in Counter(path.name for path in MODULES).items() if count > 1}
    assert twice == {"chair.py"}, "benchmarks/chair.py is the command, evaluation/chair.py the metric"
