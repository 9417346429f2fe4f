"""`cordee plan`: large models on machines of a file, this machine alone, and plain errors."""

import json
import platform
import re
import socket
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cordee.cli.main import cordee
from cordee.errors import BadRequest
from cordee.machine.described import read_nodes
from cordee.machine.devices import memory_speed, own_devices
from cordee.machine.memory import memory
from cordee.models.cards import cards
from cordee.models.gguf import read_header
from cordee.models.shape import card_shape, model_shape
from headers import MODELS, TERNARY, write_header

GB = 10**9
OFFICE = """
    [[machine]]
    name = "office"
    count = 4
    ram = "16 GB"
    [[machine.gpu]]
    name = "RTX 4090"
    vram = "24 GB"
    speed = "1 TB/s"
"""


@pytest.fixture
def nodes(tmp_path):
    """Writes a nodes file."""

    def write(text: str) -> Path:
        path = tmp_path / "nodes.toml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cordee, ["plan", *map(str, arguments)], prog_name="cordee")


def planned(*arguments: object) -> dict:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def layers_of(found: dict) -> list[int]:
    return [stage["last"] - stage["first"] for stage in found["stages"]]


def test_gpt_oss_120b_on_four_pcs_with_a_24_gb_card_from_its_header_alone(home, tmp_path, nodes):
    header = write_header("gpt-oss-120b", tmp_path / "gpt-oss-120b.gguf")
    assert header.stat().st_size < 100_000
    found = planned(header, "--nodes", nodes(OFFICE))
    assert layers_of(found) == [9, 9, 9, 9]
    assert [stage["node"] for stage in found["stages"]] == ["office-1", "office-2", "office-3", "office-4"]
    assert {stage["device"] for stage in found["stages"]} == {"RTX 4090"}
    for stage in found["stages"][:3]:
        assert stage["fit"]["weights_bytes"] == pytest.approx(15.54e9, rel=0.001)
        assert stage["needed_bytes"] < 18e9 < stage["available_bytes"] == 21.6e9
    assert all(one["used"] for one in found["machines"])
    assert 60 < found["tokens_per_second"] < 300


def test_three_of_them_have_too_little_memory_on_their_cards(home, nodes):
    three = nodes(OFFICE.replace("count = 4", "count = 3"))
    done = run("gpt-oss-120b", "--nodes", three, "--context", 1024, "--sequences", 1)
    assert done.exit_code == 0
    assert "on CPU" in done.stdout  # a few layers do not fit the cards
    roomy = nodes(OFFICE.replace("count = 4", "count = 3").replace("24 GB", "24 GiB"))
    found = planned("gpt-oss-120b", "--nodes", roomy, "--context", 1024, "--sequences", 1)
    assert sorted(layers_of(found)) == [12, 12, 12]


def test_apertus_70b_on_the_same_machines(home, tmp_path, nodes):
    header = write_header("apertus-70b", tmp_path / "apertus-70b.gguf")
    found = planned(header, "--nodes", nodes(OFFICE))
    assert sum(layers_of(found)) == 80
    assert all(25 <= layers <= 28 for layers in layers_of(found))  # layers with more bits are larger
    [idle] = [one for one in found["machines"] if not one["used"]]
    assert idle["node"] == "office-4"
    assert idle["why"].startswith("not needed")


@pytest.mark.parametrize("name", [*MODELS, *TERNARY])
def test_a_card_says_what_the_header_says(home, tmp_path, nodes, name):
    header = read_header(write_header(name, tmp_path / "m.gguf"), weights=False)
    card, real = card_shape(cards()[name]), model_shape(header, name)
    assert (card.layers, card.n_embd, card.n_vocab) == (real.layers, real.n_embd, real.n_vocab)
    assert (card.windowed, card.cuttable, card.cell_bytes) == (real.windowed, True, real.cell_bytes)
    for size in ("layer_bytes", "active_bytes"):
        assert sum(getattr(card, size)) == pytest.approx(sum(getattr(real, size)), rel=1e-6)
    assert card.row_floats == real.row_floats
    assert card.whole_extra_bytes == pytest.approx(real.whole_extra_bytes, rel=1e-3)
    assert card.last_extra_bytes == real.last_extra_bytes
    assert card.active_head_bytes == real.active_head_bytes
    asked = ("--nodes", nodes(OFFICE), "--context", 2048)
    stages = [len(planned(model, *asked)["stages"]) for model in (name, tmp_path / "m.gguf")]
    assert stages[0] == stages[1]


def test_the_table_is_for_people(home, nodes):
    done = run("gpt-oss-120b", "--nodes", nodes(OFFICE + '[[machine]]\nname = "old"\nram = "1 GB"\n'))
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "Model: gpt-oss-120b: 36 layers, 63.4 GB"
    assert lines[1] == "Asked: 4 answers at a time, of 8192 tokens each"
    assert lines[2] == "Fit:   It fits in 4 stages: it needs 67.0 GB of memory in all."
    assert lines[3].startswith("Speed: about ")
    assert any(line.split()[:5] == ["0-8", "office-1", "RTX", "4090", "15.5"] for line in lines)
    assert any(line.split()[:2] == ["office-1", "in"] and line.endswith("(host)") for line in lines)
    assert lines[-1].startswith("old       out  too small: a stage takes ")


def test_what_does_not_fit_says_what_would(home, nodes):
    small = nodes(OFFICE.replace("count = 4", "count = 1"))
    for arguments in (("--json",), ()):
        done = run("gpt-oss-120b", "--nodes", small, *arguments)
        assert done.exit_code == 6
        [line] = done.stderr.splitlines()
        assert line.startswith("cordee: gpt-oss-120b does not fit. It needs 6")
        assert "GB: add a machine with at least " in line
        if arguments:
            assert json.loads(done.stdout)["placement"] is None
    done = run("gpt-oss-20b", "--nodes", small, "--context", 131072, "--sequences", 8)
    assert done.exit_code == 6
    advice = done.stderr.partition("`cordee deploy gpt-oss-20b ")[2].partition("` fits.")[0]
    assert advice.startswith("--context 131072 --sequences ")
    assert run("gpt-oss-20b", "--nodes", small, *advice.split()).exit_code == 0


def test_where_memory_is_short_there_are_fewer_answers_and_it_is_said(home, nodes):
    tight = nodes('[[machine]]\nname = "pc"\nram = "17 GB"\n')
    found = planned("gpt-oss-20b", "--nodes", tight)
    assert found["context"] == 8192
    assert 1 < found["sequences"] < 4
    lacks = f"{found['sequences']} answers at a time instead of 4"
    assert found["lacks"] == lacks
    asked = f"{found['sequences']} answers at a time, of 8192 tokens each (memory is short: {lacks})"
    assert f"Asked: {asked}" in run("gpt-oss-20b", "--nodes", tight).stdout.splitlines()
    asked = ("gpt-oss-20b", "--nodes", tight, "--sequences", 8)
    assert run(*asked, "--context", 4096).exit_code == 6
    shorter = planned(*asked)  # the context was left open
    assert (shorter["sequences"], shorter["context"] < 4096) == (8, True)


@pytest.mark.parametrize("name", sorted(cards()))
def test_every_card_can_be_planned_and_shown_without_a_download(home, nodes, monkeypatch, name):
    def connect(*_: object) -> None:
        raise AssertionError("nothing outside is to be asked")

    monkeypatch.setattr(socket.socket, "connect", lambda self, address: _only_local(self, connect))
    found = planned(name, "--nodes", nodes(OFFICE))
    assert sum(layers_of(found)) == cards()[name].layers
    assert found["prompt_tokens_per_second"] > found["tokens_per_second"] > 0
    done = CliRunner().invoke(cordee, ["show", name, "--json"], prog_name="cordee")
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["layers"], shown["context"]) == (cards()[name].layers, cards()[name].context)
    assert shown["weights_bytes"] == pytest.approx(found["weights_bytes"], rel=0.15)
    assert shown["fit"]["need_bytes"] > shown["weights_bytes"]
    assert run("nosuch-" + name, "--nodes", nodes(OFFICE)).exit_code == 3


def _only_local(opened: socket.socket, refuse) -> None:
    """The agent's socket is asked whether a node runs here; none does."""
    if opened.family != socket.AF_UNIX:
        refuse()
    raise FileNotFoundError


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.file_bytes])
def test_a_published_file_is_its_tensors_and_a_vocabulary(home, tmp_path, name):
    """So the dimensions and types that cards are made from are those of the files that are fetched."""
    header = read_header(write_header(name, tmp_path / "m.gguf"), weights=False)
    rest = MODELS[name].file_bytes - sum(tensor.nbytes for tensor in header.tensors)
    usual = {"qwen3": 5.96e6, "qwen3moe": 5.96e6, "gemma3": 6.54e6, "llama": 7.87e6}
    assert rest == pytest.approx(usual[header.architecture], rel=0.01)


def test_a_plan_says_how_fast_it_reads_and_when_it_is_too_slow_to_use(home, nodes):
    slow = nodes('[[machine]]\nname = "old"\nram = "64 GB"\nram_speed = "16 GB/s"\n')
    done = run("apertus-70b", "--nodes", slow)
    lines = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    assert "for one answer, if memory is read as fast as nodes.toml says" in lines["Speed"]
    assert re.search(r"prompts at 0\.7\d* tokens/s or faster: a page in 13 min .. s or less", lines["Reads"])
    assert "too slow to use" in lines["Note"]
    assert planned("apertus-70b", "--nodes", slow)["too_slow"] is True
    quick = run("starter", "--nodes", slow)
    assert "Note" not in quick.stdout
    assert planned("starter", "--nodes", slow)["too_slow"] is False
    assert "Speed is" not in quick.stdout
    assert "about 70 % of the data sheet" in " ".join(run("--help").stdout.split())


def test_a_plan_hints_at_replicas_where_other_machines_hold_a_copy(home, nodes):
    found = run("gpt-oss-20b", "--nodes", nodes(OFFICE))
    assert (
        "the machines hold 4 copies: `cordee deploy gpt-oss-20b --replicas 4` answers 4 times" in found.stdout
    )
    assert planned("gpt-oss-20b", "--nodes", nodes(OFFICE))["copies"] == 4
    assert "copies" not in run("gpt-oss-120b", "--nodes", nodes(OFFICE)).stdout


def test_a_stored_model_on_this_machine_alone(home, starter_path):
    from cordee.models.store import Store

    Store().add_file(starter_path, "starter", source="test")
    found = planned("starter", "--context", 1024, "--sequences", 1)
    [stage] = found["stages"]
    assert (stage["first"], stage["last"], stage["fetch_bytes"]) == (0, 30, 0)
    assert found["placement"]["model"] == Store().get("starter").digest
    assert found["machines"] == [
        {
            "node": platform.node(),
            "name": platform.node(),
            "used": True,
            "why": f"layers 0-29 on {stage['device']}",
        }
    ]


def test_the_devices_of_this_machine():
    devices = own_devices()
    assert len({one.name for one in devices}) == len(devices) > 0
    for one in devices:
        assert one.read_bytes_per_second > 1e7
        if one.kind == "cpu":
            assert 0 < one.memory_bytes < memory().total_bytes
    assert memory_speed(0, 3) > 0  # however little memory is free


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("nosuch", 3, "nosuch"),
        ("qwen38b", 3, "(did you mean qwen3-8b"),
        ("novel.gguf", 4, "not a GGUF model file"),
    ],
)
def test_a_model_that_is_not_there(home, tmp_path, monkeypatch, nodes, model, code, words):
    monkeypatch.chdir(tmp_path)
    Path("novel.gguf").write_text("It was a dark and stormy night.")
    done = run(model, "--nodes", nodes(OFFICE))
    assert (done.exit_code, done.stdout) == (code, "")
    assert words in done.stderr


def test_a_context_that_the_model_was_not_made_for(home, nodes):
    done = run("apertus-8b", "--nodes", nodes(OFFICE), "--context", 65_537)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "at most 65536 tokens, not 65537" in done.stderr


def test_a_header_that_ends_too_early_is_an_error(home, tmp_path, nodes):
    header = write_header("gpt-oss-20b", tmp_path / "m.gguf")
    header.write_bytes(header.read_bytes()[:-1])
    done = run(header, "--nodes", nodes(OFFICE))
    assert done.exit_code == 4
    assert "ends in the middle of its header" in done.stderr


def test_the_example_in_the_help_is_a_nodes_file(home, tmp_path):
    text = run("--help").stdout
    example = text[text.index("[[machine]]") : text.index("Options:")]
    path = tmp_path / "nodes.toml"
    path.write_text(example)
    facts = read_nodes(path)
    assert list(facts) == ["office-1", "office-2", "office-3", "office-4"]
    optional = ("ram_speed", "disk", "network", "rtt", "speed", "count = 1")
    short = [line for line in example.splitlines() if not line.strip().startswith(optional)]
    assert len(short) == len(example.splitlines()) - len(optional)
    path.write_text("\n".join(short))
    assert read_nodes(path) == facts  # so the help shows the defaults


def test_a_machine_is_what_its_file_says(nodes):
    facts = read_nodes(
        nodes(
            """
            [[machine]]
            name = "box"
            ram = "12 GB"
            ram_speed = "50 GB/s"
            disk = "10 GB"
            network = "100 Mbit/s"
            rtt = "2 ms"
            [[machine.gpu]]
            vram = "10 GiB"
            speed = "500 GB/s"
            count = 2
            [[machine]]
            name = "bare"
            ram = "1 GB"
            """
        )
    )
    box, bare = facts["box"], facts["bare"]
    assert [(one.name, one.kind, one.memory_bytes, one.read_bytes_per_second) for one in box.devices] == [
        ("GPU", "gpu", 9 * 2**30, 500e9),
        ("GPU #2", "gpu", 9 * 2**30, 500e9),
        ("CPU", "cpu", 9 * GB, 50e9),
    ]
    assert box.disk_free_bytes == 10 * GB
    assert [one.memory_bytes for one in bare.devices] == [0]  # the system needs it all
    assert (box.rtts, bare.rtts) == ({"bare": 0.002}, {"box": 0.002})
    assert box.bytes_per_second == {"bare": 12.5e6}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("machine = 3", "Expected `array`, got `int` - at `$.machine`"),
        ("[[machine]]\nname = ", "Invalid value"),
        ('[[machine]]\nname = "a"', "missing required field `ram`"),
        ('[[machine]]\nname = "a"\nram = 16', "Expected `str`, got `int` - at `$.machine[0].ram`"),
        ('[[machine]]\nname = "a"\nram = "16"', 'ram of a is "16", not an amount like "24 GB"'),
        ('[[machine]]\nname = "a"\nram = "-1 GB"', 'ram of a is "-1 GB"'),
        (
            '[[machine]]\nname = "a"\nram = "1 GB"\nrtt = "1 GB"',
            'rtt of a is "1 GB", not an amount like "24 ms"',
        ),
        ('[[machine]]\nname = "a"\nram = "1 GB"\nspeed = "fast"', "unknown field `speed`"),
        ('[[machine]]\nname = "a"\nram = "1 GB"\ncount = 0', "`int` >= 1"),
        ('[[machine]]\nname = "a"\nram = "1 GB"\n' * 2, "two machines are called a"),
        (
            '[[machine]]\nname = "a"\ncount = 200\nram = "1 GB"\n'
            '[[machine]]\nname = "b"\ncount = 100\nram = "1 GB"',
            "300 machines",
        ),
        ("machine = []", "describes 0 machines"),
    ],
)
def test_a_mistake_in_the_nodes_file_is_named(home, nodes, text, fault):
    path = nodes(text)
    with pytest.raises(BadRequest) as refused:
        read_nodes(path)
    assert fault in refused.value.message
    assert str(path) in refused.value.message
    done = run("gpt-oss-20b", "--nodes", path)
    assert (done.exit_code, done.stdout) == (2, "")


def test_a_nodes_file_that_is_not_there_or_no_text(home, tmp_path):
    with pytest.raises(BadRequest, match="No such file"):
        read_nodes(tmp_path / "nosuch.toml")
    (tmp_path / "data.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadRequest, match=r"data\.toml"):
        read_nodes(tmp_path / "data.toml")
