"""`cordee setup`, typed at a terminal."""

from pathlib import Path

import pytest

from cordee.install import service
from terminal import Terminal


@pytest.mark.parametrize(
    ("language", "cluster", "model"),
    [("en", "this machine is to join?", "Which one"), ("fr", "doit rejoindre", "Lequel")],
)
def test_a_machine_alone_with_the_starter_model(
    tmp_path: Path, language: str, cluster: str, model: str
) -> None:
    terminal = Terminal("setup", "--language", language, home=tmp_path, columns=200)
    terminal.until(cluster)
    terminal.type("y\n")
    terminal.until("invite")
    terminal.type("cordeewrong\n")  # a mistyped code costs nothing: it asks again
    terminal.until(cluster)
    terminal.type("n\n")
    assert "NAME" in terminal.until(model)
    terminal.type("no-such-model\n")
    terminal.until("no-such-model")
    terminal.until(model)
    terminal.type("\n")
    if service.RUNNING.is_dir():
        terminal.until("service")
        terminal.type("n\n")
    terminal.until("cordee up")
    terminal.until("cordee run starter")
    assert terminal.exit_code() == 0
    assert not (tmp_path / "cluster").exists()
