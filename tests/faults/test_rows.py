"""Each of the numbered faults has exactly one test."""

import re
from collections import Counter
from pathlib import Path

from tests.support.faults import FAULTS


def test_each_of_the_faults_has_one_test_with_its_number() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    numbers = Counter(map(int, re.findall(r"^def test_(\d\d)_", sources, re.MULTILINE)))
    assert numbers == dict.fromkeys(range(1, FAULTS + 1), 1)
