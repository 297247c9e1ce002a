"""For the tests of commands."""

import shutil

import pytest
from command import finished_run


@pytest.fixture
def run(tmp_path):
    """A copy of a finished run that a test may spoil."""
    return shutil.copytree(finished_run(), tmp_path / "run")
