"""What all tests share: a state folder of their own, the starter model, reproducible property tests."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Numpy reads it when it is imported. The tests run in several processes, and matrices are small.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import pytest

from cordee.worker.process import BATCH_INVARIANT_ENVIRONMENT, ENVIRONMENT

# Stages that live in the test process compute as those in workers do; read when libllama is loaded.
os.environ |= ENVIRONMENT | BATCH_INVARIANT_ENVIRONMENT

hypothesis.settings.register_profile("house", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of the whole run, so that no test sees or changes the user's own."""
    home = tmp_path_factory.mktemp("cordee-home")
    os.environ["CORDEE_HOME"] = str(home)
    return home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state folder for one test."""
    monkeypatch.setenv("CORDEE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder whose name leaves room for those of sockets, which a system allows about 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="cordee-test-", dir=os.path.realpath("/tmp")) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def starter_path() -> Path:
    """The starter model's file: CORDEE_TEST_STARTER, or where `make setup` puts it."""
    default = Path(sys.prefix) / "share" / "cordee" / "starter.gguf"
    path = Path(os.environ.get("CORDEE_TEST_STARTER", default))
    if not path.is_file():
        pytest.fail(f"{path} is missing; run `make setup`")
    return path
