"""Importing the package tells OpenMP to let waiting threads sleep."""

import os
import subprocess
import sys

import pytest

FIRST = {
    "nothing": "",
    "torch": "import sys, types; sys.modules['torch'] = types.ModuleType('torch')",
}


@pytest.mark.parametrize(
    ("first", "given", "expected"),
    [("nothing", None, "PASSIVE"), ("nothing", "ACTIVE", "ACTIVE"), ("torch", None, None)],
)
def test_threads_sleep_unless_the_user_asked_otherwise_or_it_is_too_late(
    first: str, given: str | None, expected: str | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    script = f"{FIRST[first]}\nimport tahoex1_hf, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(expected)
