"""A real NDIF server for the tests of this folder: the one that runs, or one that is started, and stopped."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "server"))

import launch


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.remote)


@pytest.fixture(scope="session")
def ndif():
    """The server's URL."""
    # The hub's client reads its variables when it is imported, which is before this file.
    if not launch.PYTHON.exists() or os.environ.get("HF_ENDPOINT") != launch.HUB_URL:
        pytest.skip("remote tests have a server and variables of their own: make test-remote")
    mine = not launch.healthy()
    launch.up()
    yield launch.HOST
    if mine:
        launch.down()


@pytest.fixture(scope="session")
def folders():
    """The served models, as the folders that a local run loads."""
    return {name: str(path) for name, path in launch.models().items()}
