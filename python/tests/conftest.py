from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT, FakeDaemon, Vramd


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDaemon]:
    daemon = FakeDaemon(tmp_path / "fake.sock")
    yield daemon
    daemon.stop()


@pytest.fixture(scope="session")
def binary() -> str:
    binary = os.environ.get("VRAMD_BINARY") or str(ROOT / "target" / "debug" / "vramd")
    if not os.access(binary, os.X_OK):
        pytest.skip(f"no daemon to test against: build it (cargo build), or set VRAMD_BINARY; tried {binary}")
    return binary


@pytest.fixture(scope="session")
def vramd(binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vramd]:
    daemon = Vramd(binary, tmp_path_factory.mktemp("vramd"))
    yield daemon
    daemon.stop()
