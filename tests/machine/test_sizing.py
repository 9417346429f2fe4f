"""A service is as large as the machine allows, and refused with a clear message where it does not fit."""

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from cordee.cluster.demand import CELLS_DEFAULT, CONTEXT_USEFUL, SEQUENCES
from cordee.errors import BadRequest, DoesNotFit
from cordee.machine.devices import own_devices
from cordee.machine.memory import BESIDE_BYTES, Memory, memory
from cordee.machine.sizing import size_request, stage_config, usable_memory
from cordee.models.fit import own_context
from cordee.models.gguf import Header, read_header
from tiny import make_tiny


def huge_model(path: Path, nbytes: int, context: int) -> Header:
    """A valid GGUF with this many bytes of weights, nearly all of them a hole in the file."""
    rows = nbytes // (2 * 4096)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(context)
    writer.add_embedding_length(4096)
    writer.add_feed_forward_length(rows)
    writer.add_head_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape in (("token_embd.weight", (32, 4096)), ("blk.0.ffn_up.weight", (rows, 4096))):
        kind = GGMLQuantizationType.F16
        writer.add_tensor_info(name, shape, np.dtype(np.float16), 2 * shape[0] * shape[1], kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + nbytes + (1 << 20))
    return read_header(path)


def config_of(header: Header, context: int | None = None, sequences: int | None = 4, **given: object):
    requested = size_request(own_context(header), context, sequences, header.path.name)
    return stage_config(header, requested, name=header.path.name, command="cordee serve m", **given)


def test_a_model_larger_than_memory_is_refused(tmp_path: Path) -> None:
    header = huge_model(tmp_path / "huge.gguf", nbytes=4 * memory().total_bytes, context=4096)
    with pytest.raises(DoesNotFit, match=r"huge\.gguf does not fit") as refused:
        config_of(header)
    assert "GB" in refused.value.message
    assert refused.value.exit_code == 6


def test_a_context_larger_than_memory_is_refused_and_a_fitting_one_is_found(tmp_path: Path) -> None:
    header = huge_model(tmp_path / "long.gguf", nbytes=1 << 24, context=1 << 30)
    with pytest.raises(DoesNotFit, match="does not fit"):
        config_of(header, context=1 << 28)
    assert config_of(header, sequences=8).context == CELLS_DEFAULT // 8


def test_little_memory_makes_the_context_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = huge_model(tmp_path / "long.gguf", nbytes=1 << 24, context=1 << 20)
    generous = config_of(header, sequences=1).context
    monkeypatch.setattr("cordee.machine.sizing.usable_memory", lambda devices: 500_000_000)
    tight = config_of(header, sequences=1).context
    assert CONTEXT_USEFUL <= tight < generous == CELLS_DEFAULT


def test_by_a_hair_there_are_fewer_answers_and_then_a_shorter_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = huge_model(tmp_path / "long.gguf", nbytes=1 << 24, context=1 << 20)
    found: list[tuple[int, int]] = []
    for room in range(1_000_000_000, 200_000_000, -5_000_000):
        monkeypatch.setattr("cordee.machine.sizing.usable_memory", lambda devices, room=room: room)
        config = config_of(header, sequences=None)
        if (config.sequences, config.context) not in found:
            found.append((config.sequences, config.context))
    assert found[:8] == [(answers, CELLS_DEFAULT // SEQUENCES) for answers in range(8, 0, -1)]
    assert [answers for answers, _ in found[8:]] == [1] * len(found[8:])
    contexts = [context for _, context in found[7:]]
    assert contexts == sorted(contexts, reverse=True)
    assert contexts[-1] >= CONTEXT_USEFUL


def test_what_was_asked_for_is_refused_rather_than_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = huge_model(tmp_path / "long.gguf", nbytes=1 << 24, context=1 << 20)
    monkeypatch.setattr("cordee.machine.sizing.usable_memory", lambda devices: 350_000_000)
    config = config_of(header, context=2048, sequences=None)
    assert (config.context, config.sequences < SEQUENCES) == (2048, True)
    with pytest.raises(
        DoesNotFit, match=r"long\.gguf does not fit\. It needs .* for 8 answers of 4096"
    ) as no:
        config_of(header, context=4096, sequences=8)
    advised = re.search(r"`cordee serve m --context (\d+) --sequences (\d+)` fits", no.value.message)
    assert advised, no.value.message
    context, sequences = map(int, advised.groups())
    config = config_of(header, context=context, sequences=sequences)
    assert (config.context, config.sequences) == (4096, sequences)


def test_the_models_own_context_bounds_what_is_asked_for(tmp_path: Path) -> None:
    header = read_header(make_tiny("llama", tmp_path / "tiny.gguf"))
    own = header.get(".context_length")
    assert config_of(header, sequences=1).context == own
    assert config_of(header, context=own).context == own
    with pytest.raises(BadRequest, match=f"at most {own} tokens"):
        config_of(header, context=own + 1)


def test_devices_are_taken_by_name(tmp_path: Path) -> None:
    header = read_header(make_tiny("llama", tmp_path / "tiny.gguf"))
    assert config_of(header, devices=("CPU",)).devices == ()
    with pytest.raises(BadRequest, match=r"no device CUDA7 here; this libllama has .*CPU"):
        config_of(header, devices=("CUDA7",))


def test_a_vocabulary_has_room_beside_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts when the memory was promised; without room the system ends a stage that fits tightly."""
    for available_bytes in (500_000_000, BESIDE_BYTES - 1):
        room = Memory(1 << 40, available_bytes)
        monkeypatch.setattr("cordee.machine.memory.memory", lambda room=room: room)
        for promised in (usable_memory([]), own_devices()[-1].memory_bytes):
            assert 0 <= promised <= max(0, available_bytes - BESIDE_BYTES)
