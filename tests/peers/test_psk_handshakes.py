"""The tests of pre-shared keys for which this Python is too old, with another one."""

from __future__ import annotations

import re
import subprocess

import pytest

from gateway.psk import AVAILABLE
from tests.support.gateway import ROOT, environment
from tests.support.modern import Modern


@pytest.mark.skipif(AVAILABLE, reason="this Python runs them itself")
def test_the_handshakes_with_a_newer_python(modern: Modern) -> None:
    command = [*modern.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no"]
    names = sorted(path.name for path in (ROOT / "tests").glob("test_psk*.py"))
    files = [f"{modern.sources}/tests/{name}" for name in names]
    done = subprocess.run(
        [*command, "--rootdir", modern.sources, "-c", f"{modern.sources}/pyproject.toml", *files],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100, done.stdout
