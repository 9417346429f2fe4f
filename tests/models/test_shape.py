"""A model's shape, as the cluster passes it on, takes the memory that its header says."""

from dataclasses import replace
from itertools import combinations

import msgspec
import pytest

import tiny
from cordee.cluster.facts import ModelShape
from cordee.cluster.memory import stage_of
from cordee.engine.stage import StageConfig
from cordee.errors import CordeeError
from cordee.models.architectures import architecture
from cordee.models.fit import estimate, stage_shape
from cordee.models.gguf import Header, read_header
from cordee.models.shape import model_shape
from cordee.models.slices import plan_slice

LAYERS = 16  # every architecture that may be cut at all may be cut in two here
CONFIG = StageConfig(context=1000, sequences=3, batch_rows=256)
BYTES = 1000  # an architecture's factors for positions, which a slice that never reads them has to leave out


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_shape_takes_what_the_header_says_wherever_it_is_cut(tmp_path, name):
    header = read_header(tiny.make_tiny(name, tmp_path / "model.gguf", layers=LAYERS))
    shape = model_shape(header, "digest")
    assert shape.allows(0, LAYERS)
    assert shape.cuttable == (architecture(name).obstacle(LAYERS) is None)
    for first, last in combinations(range(LAYERS + 1), 2):
        assert shape.allows(first, last) == may_be_cut(header, first, last)
        if shape.allows(first, last) and (first == 0 or last in (first + 4, LAYERS)):
            found, expected = stage_of(shape, first, last), stage_shape(header, first, last)
            assert found.weights_bytes == pytest.approx(expected.weights_bytes, abs=BYTES)
            assert replace(found, weights_bytes=0) == replace(expected, weights_bytes=0)
            total = estimate(header, first, last, CONFIG).total_bytes
            assert found.fit(CONFIG).total_bytes == pytest.approx(total, abs=BYTES)


def may_be_cut(header: Header, first: int, last: int) -> bool:
    try:
        plan_slice(header, first, last)
    except CordeeError:
        return False
    return True


def test_a_mixture_reads_only_the_experts_it_chooses(tmp_path):
    shape = model_shape(read_header(tiny.make_tiny("qwen3moe", tmp_path / "m.gguf", layers=4)), "digest")
    experts = 3 * tiny.EMBD * tiny.EXPERT_FF * tiny.EXPERTS * 4
    idle = experts * (tiny.EXPERTS - tiny.EXPERTS_USED) // tiny.EXPERTS
    assert [all_ - active for all_, active in zip(shape.layer_bytes, shape.active_bytes, strict=True)] == [
        idle
    ] * 4
    dense = model_shape(read_header(tiny.make_tiny("qwen3", tmp_path / "d.gguf", layers=4)), "digest")
    assert dense.active_bytes == dense.layer_bytes


def test_a_head_of_its_own_or_the_embedding_is_read_for_every_token(tmp_path):
    weights = tiny.EMBD * tiny.VOCAB * 4
    for name in ("llama", "qwen3"):  # tied, and not
        shape = model_shape(read_header(tiny.make_tiny(name, tmp_path / "m.gguf")), "digest")
        assert (shape.active_head_bytes, shape.embedding_bytes) == (weights, weights)


def test_a_shape_travels_and_a_damaged_one_is_refused(tmp_path):
    shape = model_shape(read_header(tiny.make_tiny("gpt-oss", tmp_path / "m.gguf")), "digest")
    data = msgspec.msgpack.encode(shape)
    assert msgspec.msgpack.decode(data, type=ModelShape) == shape
    damaged = msgspec.to_builtins(shape) | {"active_bytes": [1, 2]}
    with pytest.raises(msgspec.ValidationError, match="one item for each of its layers"):
        msgspec.convert(damaged, ModelShape)
