"""Fixtures that all tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped without."""
    folder = Path(os.environ.get("KERAS_EXT_SHARED", ROOT / ".." / "shared"))
    if not folder.is_dir():
        pytest.skip("real data is not beside this checkout")
    return folder.resolve()
