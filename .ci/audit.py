"""What is installed, looked up in the package index: releases their makers have withdrawn, projects under quarantine.

This is what an index alone can say. Known vulnerabilities are told by an interface that few mirrors have: the workflow
asks it.
"""

import importlib.metadata
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import requests
from packaging.utils import canonicalize_version
from pypi_simple import PYPI_SIMPLE_ENDPOINT, NoSuchProjectError, ProjectPage, PyPISimple
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

AT_ONCE = 8


def faults(name: str, version: str, page: ProjectPage) -> list[str]:
    """Sentences about one installed release; none of a version the index does not have, as a build of one's own."""
    found = []
    if page.status == "quarantined":
        found.append(f"{name} is quarantined: {page.status_reason or 'no reason is given'}")
    wanted = canonicalize_version(version)
    files = [file for file in page.packages if canonicalize_version(file.version or "") == wanted]
    if files and all(file.is_yanked for file in files):
        found.append(f"{name} {version} was withdrawn: {files[0].yanked_reason or 'no reason is given'}")
    return found


def audit(installed: dict[str, str], endpoint: str = PYPI_SIMPLE_ENDPOINT) -> list[str]:
    """Sentences about what is `installed`, versions by name. Raises `requests.RequestException` without an index."""
    session = requests.Session()
    # An index that is busy for a moment is no finding.
    busy = Retry(5, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
    session.mount("https://", HTTPAdapter(pool_maxsize=AT_ONCE, max_retries=busy))
    with PyPISimple(endpoint, session=session) as index, ThreadPoolExecutor(AT_ONCE) as threads:

        def ask(name: str) -> list[str]:
            try:
                return faults(name, installed[name], index.get_project_page(name, timeout=60))
            except NoSuchProjectError:
                return []  # ours, before it is published

        return [sentence for found in threads.map(ask, sorted(installed)) for sentence in found]


if __name__ == "__main__":
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    sentences = audit(installed, os.environ.get("PIP_INDEX_URL", PYPI_SIMPLE_ENDPOINT))
    print("\n".join(sentences) or f"none of {len(installed)} installed packages was withdrawn")
    sys.exit(bool(sentences))
