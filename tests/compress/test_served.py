"""A compressed model is served like any other: the same text from one stage and from three."""

from dataclasses import replace
from pathlib import Path

import pytest

from cordee.compress.compress import compress
from cordee.compress.fitter import CompressOptions
from cordee.serving.local_service import ServiceConfig
from ordinary_models import make_ordinary, prose
from serving import COMPLETIONS, running

OPTIONS = CompressOptions("fit", calibration=prose(600))


@pytest.mark.parametrize(
    "changes", [{}, {"planes": 2, "keep": ("*.attn_v",), "rotate": True}], ids=["one", "two"]
)
def test_one_stage_and_three_say_the_same(tmp_path: Path, changes: dict[str, object]) -> None:
    path = make_ordinary(tmp_path / "m.gguf", layers=3)
    compress(path, tmp_path / "small.gguf", replace(OPTIONS, **changes))
    config, body = (
        ServiceConfig(context=128, threads=1),
        {"model": "starter", "prompt": "one rope", "max_tokens": 24},
    )
    texts = []
    for stages in (1, 3):
        with running(
            tmp_path / "small.gguf", tmp_path / f"store{stages}", config=config, stages=stages
        ) as server:
            texts += [
                server.request("POST", COMPLETIONS, body | options).json["choices"][0]["text"]
                for options in ({"temperature": 0}, {"temperature": 0.9, "seed": 7})
            ]
    assert texts[:2] == texts[2:] and len(set(texts)) == 2
