"""How long a page of the console takes to draw over a million predictions: `python -m tests.benchmarks.console [--rows N]`.

SQLite and PostgreSQL; in Chromium, from the click on the page's name until the script has ended and charts are drawn, in
milliseconds. The first draw of a console that was just started, and the median of the next ones.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from playwright.sync_api import Page, sync_playwright

from db import migrate
from db.session import open_database
from tests.benchmarks.bulk import MILLION, fill, two_databases
from tests.support.commands import command
from tests.support.console import CHROMIUM
from tests.support.rows import assign, make_version

PAGES = ("Tweets", "Review", "Models", "Jobs", "Ask", "Health", "Overview")
ROUNDS = 5
DRAWN = """name => document.querySelector('[data-testid=stApp]')?.dataset.testScriptState === 'notRunning'
    && [...document.querySelectorAll('h1')].some(h => h.innerText === name)
    && !document.querySelector('[data-testid=stSkeleton]')
    && [...document.querySelectorAll('[data-testid=stVegaLiteChart]')].every(c => c.querySelector('svg, canvas'))"""


@contextmanager
def console(url: str) -> Iterator[str]:
    """The address of a console over a database."""
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as folder:
        home = Path(folder) / "home"
        with command(Path(folder) / "log", {"home": home, "database_url": url}, "console", "--port", "0") as running:
            running.says("Ctrl-C")
            yield running.said().split()[0]


def drawn(page: Page, name: str) -> float:
    """Milliseconds from the click on a page's name until it is drawn."""
    began = time.perf_counter()
    page.get_by_role("link", name=name).click()
    page.wait_for_function(DRAWN, arg=name, timeout=120_000)
    return 1000 * (time.perf_counter() - began)


def measure(address: str) -> dict[str, tuple[float, float]]:
    """For each page, milliseconds of its first draw and the median of the next ones."""
    times: dict[str, list[float]] = {name: [] for name in PAGES}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        began = time.perf_counter()
        page.goto(address)
        page.wait_for_function(DRAWN, arg="Overview", timeout=120_000)
        loaded = 1000 * (time.perf_counter() - began)
        for _ in range(ROUNDS + 1):
            for name in PAGES:
                times[name].append(drawn(page, name))
        browser.close()
    return {"Overview, with the program of the page": (loaded, loaded)} | {
        name: (values[0], median(values[1:])) for name, values in times.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.console", description=__doc__)
    parser.add_argument("--rows", type=int, default=MILLION)
    options = parser.parse_args()
    for kind in ("sqlite", "postgresql"):
        with two_databases(kind) as (_, url):
            database = open_database(url)
            migrate.upgrade(database)
            version = make_version(database)
            assign(database, version)
            seconds = fill(database, version, options.rows)
            database.close()
            print(f"{kind}: {options.rows:,} predictions made in {seconds:.0f} s", flush=True)
            with console(url) as address:
                for name, (first, later) in measure(address).items():
                    print(f"  {name:40}{first:8.0f} ms first{later:8.0f} ms later", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
