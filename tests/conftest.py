"""Shared by all tests: one thread, no window, and the places."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))  # the scripts behind the Makefile are tested too


@pytest.fixture(scope="session")
def root() -> Path:
    "Top of the checkout."
    return ROOT
