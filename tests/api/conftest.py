"""Servers that several files of this folder talk to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cordee.serving.local_service import ServiceConfig
from scripted_service import ScriptedService, scripted
from serving import Running, running


@pytest.fixture
def talk(
    starter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Running, ScriptedService]]:
    """A service that says what a test tells it to."""
    with scripted(starter_path, tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture(scope="module")
def server(
    starter_path: Path, session_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """The starter model, with a short context; files whose tests need another make their own."""
    config = ServiceConfig(context=512)
    with running(starter_path, tmp_path_factory.mktemp("store"), config=config) as started:
        yield started
