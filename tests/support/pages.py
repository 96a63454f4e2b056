"""The pages of the documentation as text."""

from tests.support.paths import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")))
}


def section(name: str, page: str = "README.md") -> str:
    return PAGES[page].partition(f"\n## {name}\n")[2].partition("\n## ")[0]
