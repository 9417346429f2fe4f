"""Models come into the store from files, cards and the hub; what the hub sends is checked and goes on if cut.

The hub is a small server on loopback; huggingface_hub and the sockets are real.
"""

import fcntl
import hashlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from cordee.distribution import hub as hub_module
from cordee.distribution.pull import pull
from cordee.errors import BadModelFile, BadRequest, ModelNotFound, StorageFailed
from cordee.models.architectures import roster
from cordee.models.cards import cards
from cordee.models.gguf import read_header
from cordee.models.store import Store
from fake_hub import FakeHub
from shards import write_shards
from tiny import make_tiny

CHUNK_BYTES = 1 << 14


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny.gguf", seed=3)


@pytest.fixture
def served(home, monkeypatch):
    """A function that serves repositories for the rest of the test."""
    hubs = []

    def serve(repositories: dict[str, dict[str, bytes]]) -> FakeHub:
        hub = FakeHub(repositories)
        hubs.append(hub)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK_BYTES)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "no token"))
        monkeypatch.setattr(time, "sleep", lambda _: None)  # the library waits between tries
        return hub

    yield serve
    for hub in hubs:
        hub.close()


def downloads(home: Path) -> list[str]:
    folder = home / "downloads"
    return sorted(path.name for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def interrupt(done: int, total: int) -> None:
    """Ctrl-C in the middle of a download."""
    if done > total // 2:
        raise KeyboardInterrupt


def test_a_file_gets_its_own_name_or_the_one_given(home, model, tmp_path):
    assert pull(str(model)).name == "tiny"
    assert pull(str(model), "mine").name == "mine"
    odd = tmp_path / "my (new) model.gguf"
    odd.write_bytes(model.read_bytes())
    assert pull(str(odd)).name == "my-new-model"
    assert pull(str(write_shards(read_header(model), tmp_path))).name == "m"
    assert len(Store().list()) == 4


def test_a_file_in_the_users_home_and_one_that_is_not_there(home, model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    assert pull("~/tiny.gguf").name == "tiny"
    for missing in ("~/other.gguf", "/nowhere/x.gguf", "./x"):
        with pytest.raises(ModelNotFound, match=r"There is no file"):
            pull(missing)


def test_an_unknown_source_gets_a_list_of_what_there_is(home):
    with pytest.raises(ModelNotFound, match="did you mean gpt-oss-20b"):
        pull("gpt-os-20b")
    with pytest.raises(ModelNotFound, match="a model card: `cordee models` lists the cards"):
        pull("???")


def test_an_invalid_name_is_refused_before_anything_is_fetched(served, model):
    hub = served({"o/m": {"a.gguf": model.read_bytes()}})
    with pytest.raises(BadRequest, match="cannot name"):
        pull("o/m", "../x")
    assert hub.ranges == []


def test_a_repository_is_fetched_checked_and_leaves_no_second_copy(served, home, model):
    hub = served({"owner/tiny-GGUF": {"tiny-Q8_0.gguf": model.read_bytes()}})
    calls, told = [], []
    stored = pull("owner/tiny-GGUF", None, None, lambda *call: calls.append(call), told.append)
    assert (stored.name, stored.source) == ("tiny", "owner/tiny-GGUF/tiny-Q8_0.gguf")
    assert stored.path.read_bytes() == model.read_bytes()
    assert stored.digest == f"sha256:{hashlib.sha256(model.read_bytes()).hexdigest()}"
    assert len(calls) > 2
    assert calls == sorted(calls)
    assert calls[-1] == (stored.nbytes, stored.nbytes)
    assert told == ["Fetching tiny-Q8_0.gguf (0.0 GB) from the hub repository owner/tiny-GGUF"]
    assert downloads(home) == []
    assert (hub.tokens, hub.strange) == ({None}, [])
    assert pull(stored.source).digest == stored.digest


def test_the_users_token_goes_along(served, model, monkeypatch):
    hub = served({"o/m": {"a.gguf": model.read_bytes()}})
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull("o/m")
    assert hub.tokens == {"Bearer hf_secret"}


def test_a_broken_connection_is_resumed_where_it_broke(served, model):
    data = model.read_bytes()
    hub = served({"o/m": {"a.gguf": data}})
    hub.stop_after = 3 * CHUNK_BYTES
    stored = pull("o/m")
    assert stored.path.read_bytes() == data
    assert hub.ranges[:2] == [None, f"bytes={3 * CHUNK_BYTES}-"]
    assert len(hub.ranges) == -(-len(data) // (3 * CHUNK_BYTES))


def test_a_later_process_goes_on_where_an_interrupted_one_stopped(served, home, model):
    data = model.read_bytes()
    hub = served({"o/m": {"a.gguf": data}})
    with pytest.raises(KeyboardInterrupt):
        pull("o/m", progress=interrupt)
    assert downloads(home) == ["a.gguf.partial"]
    assert Store().list() == []
    stored = pull("o/m")
    assert stored.path.read_bytes() == data
    assert len(hub.ranges) == 2
    assert len(data) // 2 < int(re.search(r"\d+", hub.ranges[1])[0]) < len(data)
    assert downloads(home) == []


CHILD = f"""
    from huggingface_hub import constants
    constants.DOWNLOAD_CHUNK_SIZE = {CHUNK_BYTES}
    from cordee.distribution.pull import pull
    pull("o/m", progress=lambda done, total: print(done, flush=True))
"""


def test_a_killed_process_loses_nothing_that_had_come(served, home, model):
    data = model.read_bytes()
    hub = served({"o/m": {"a.gguf": data}})
    hub.stop_after, hub.stall = 5 * CHUNK_BYTES, threading.Event()
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "CORDEE_HOME": str(home)}
    command = [sys.executable, "-c", textwrap.dedent(CHILD)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if int(line) == 5 * CHUNK_BYTES:
                break
        with pytest.raises(StorageFailed, match="Another process is fetching"):
            pull("o/m")
        process.send_signal(signal.SIGKILL)
    hub.stall.set()
    hub.stop_after = hub.stall = None
    assert pull("o/m").path.read_bytes() == data
    assert hub.ranges == [None, f"bytes={5 * CHUNK_BYTES}-"]


def test_a_server_without_ranges_is_asked_again_from_the_start(served, model, home):
    data = model.read_bytes()
    hub = served({"o/m": {"a.gguf": data}})
    with pytest.raises(KeyboardInterrupt):
        pull("o/m", progress=interrupt)
    hub.ignore_ranges = True
    assert pull("o/m").path.read_bytes() == data
    assert hub.ranges[1] is not None


def test_content_that_is_not_what_was_promised_is_refused_and_removed(served, home, model):
    data = model.read_bytes()
    hub = served({"o/m": {"a.gguf": data}})
    hub.promised["a.gguf"] = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(StorageFailed, match="other content than the hub promised"):
        pull("o/m")
    assert downloads(home) == []
    assert Store().list() == []
    hub.promised.clear()
    assert pull("o/m").path.read_bytes() == data


def test_a_damaged_partial_file_is_noticed(served, home, model):
    data = model.read_bytes()
    hub = served({"o/m": {"a.gguf": data}})
    with pytest.raises(KeyboardInterrupt):
        pull("o/m", progress=interrupt)
    partial = next((home / "downloads").rglob("*.partial"))
    partial.write_bytes(b"x" + partial.read_bytes()[1:])
    with pytest.raises(StorageFailed, match="other content"):
        pull("o/m")
    partial.write_bytes(data + b"too much")
    assert pull("o/m").path.read_bytes() == data
    assert hub.ranges[-1] is None


def test_what_is_not_a_model_is_not_kept(served, home):
    served({"o/m": {"a.gguf": b"no model at all, only some text"}})
    with pytest.raises(BadModelFile, match="not a GGUF"):
        pull("o/m")
    assert downloads(home) == []
    assert Store().list() == []


def test_all_shards_are_fetched_and_merged(served, home, model, tmp_path):
    first = write_shards(read_header(model), tmp_path)
    files = {f"Q8_0/{path.name}": path.read_bytes() for path in tmp_path.glob("*.gguf")}
    hub = served({"o/m": {**files, "Q4_0/x-Q4_0-00001-of-00002.gguf": b"alone"}})
    calls = []
    stored = pull("o/m", progress=lambda *call: calls.append(call))
    assert stored.source == f"o/m/Q8_0/{first.name}"
    assert len(read_header(stored.path).tensors) == len(read_header(model).tensors)
    assert len(hub.ranges) == 2
    total = sum(map(len, files.values()))
    assert max(call for call in calls if call[1] == total) == (total, total)
    assert downloads(home) == []


@pytest.mark.parametrize(
    ("source", "files", "expected"),
    [
        ("o/m", ["m-Q8_0", "m-Q4_K_M", "m-F16"], "m-Q4_K_M"),
        ("o/m", ["m-mxfp4", "m-Q8_0"], "m-mxfp4"),
        ("o/m", ["m.Q2_K", "m.Q4_0", "m.Q8_0"], "m.Q4_0"),
        ("o/m", ["whatever"], "whatever"),
        ("o/m", ["m-Q4_K_M", "mmproj-m-Q4_K_M", "m-imatrix"], "m-Q4_K_M"),
        ("o/m:q8_0", ["m-Q8_0", "m-Q4_K_M"], "m-Q8_0"),
        ("o/m:Q4_K_XL", ["m-UD-Q4_K_XL", "m-Q4_K_M"], "m-UD-Q4_K_XL"),
        ("o/m:IQ4_XS", ["m-IQ4_XS", "m-Q4_K_M"], "m-IQ4_XS"),
        ("o/m:Q4_0", ["m-Q4_0", "m-Q4_0_4_4"], "m-Q4_0"),
        ("o/m/sub/b.gguf", ["sub/a", "sub/b"], "sub/b"),
        # quantizations that only the folder names, as in a repository of one model in all of them
        ("o/m", ["Q8_0/model", "Q4_K_M/model", "F16/model"], "Q4_K_M/model"),
        ("o/m:q8_0", ["Q8_0/model", "Q4_K_M/model"], "Q8_0/model"),
        ("o/m:IQ2_XS", ["UD-IQ2_XS/m-0.5B", "Q4_0/m-IQ4_XS"], "UD-IQ2_XS/m-0.5B"),
        ("o/m:IQ4_XS", ["UD-IQ2_XS/m-0.5B", "Q4_0/m-IQ4_XS"], "Q4_0/m-IQ4_XS"),
        # statistics of a quantizer, and models that were quantized by them
        ("o/m", ["m-Q4_K_M", "m-f16-imatrix", "imatrix", "m.imatrix"], "m-Q4_K_M"),
        ("o/m", ["m-Q4_K_M-imatrix", "m-Q5_K_M-imatrix", "m-BF16-imatrix"], "m-Q4_K_M-imatrix"),
        ("o/m:IQ3_XXS", ["m-IQ3_XXS-imatrix", "imatrix-m-F32"], "m-IQ3_XXS-imatrix"),
        ("o/m", ["Q4_K_M/model", "Q4_K_M/imatrix", "Q4_K_M/mmproj-model-f16"], "Q4_K_M/model"),
    ],
)
def test_the_right_one_of_several_files_is_chosen(served, model, source, files, expected):
    other = b"not the one"
    served({"o/m": {f"{f}.gguf": model.read_bytes() if f == expected else other for f in files}})
    assert pull(source).source == f"o/m/{expected}.gguf"


@pytest.mark.parametrize(
    ("source", "files", "message"),
    [
        (
            "o/m",
            ["m-Q2_K", "m-Q3_K_S"],
            "has several models: say which, as in o/m:Q2_K. It has :Q2_K, :Q3_K_S.",
        ),
        ("o/m", ["a-Q4_K_M", "b-Q4_K_M"], "as in o/m/a-Q4_K_M.gguf. It has /a-Q4_K_M.gguf, /b-Q4_K_M.gguf."),
        ("o/m:Q8_0", ["m-Q4_K_M"], "has no such model: say which, as in o/m:Q4_K_M."),
        ("o/m/x.gguf", ["m-Q4_K_M"], "has no such model: say which, as in o/m/m-Q4_K_M.gguf."),
    ],
)
def test_an_unclear_choice_lists_what_there_is(served, source, files, message):
    served({"o/m": {f"{name}.gguf": b"x" for name in files}})
    with pytest.raises(BadRequest, match=re.escape(message)):
        pull(source)


def test_a_repository_without_models_says_so(served):
    served({"o/m": {"model.safetensors": b"x", "mmproj-F16.gguf": b"x"}})
    with pytest.raises(ModelNotFound, match="no GGUF model"):
        pull("o/m")


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (403, "GatedRepo", StorageFailed, "agree to its terms.*HF_TOKEN"),
        (404, "RepoNotFound", ModelNotFound, "check the spelling"),
        (404, "EntryNotFound", ModelNotFound, "no longer has what was asked for"),
        (500, "", StorageFailed, "fault of its own .500.*try again later"),
        (429, "", StorageFailed, "429.*try again in some minutes"),
    ],
)
def test_the_hubs_refusals_come_with_the_remedy(served, home, status, code, error, message):
    hub = served({"o/m": {"a.gguf": b"x"}})
    hub.status, hub.error_code = status, code
    with pytest.raises(error, match=message):
        pull("o/m")
    assert downloads(home) == []


def test_without_a_connection_to_the_hub_and_offline(served, model, monkeypatch):
    served({"o/m": {"a.gguf": model.read_bytes()}}).close()
    with pytest.raises(StorageFailed, match=r"refused.*check the connection"):
        pull("o/m")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageFailed, match="offline mode"):
        pull("o/m")


def test_a_name_that_no_repository_can_have(served):
    served({})
    with pytest.raises(BadRequest, match="owner/name"):
        pull("o/--m")


def test_a_disk_too_small_is_refused_before_anything_is_fetched(served, home, model, monkeypatch):
    hub = served({"o/m": {"a.gguf": model.read_bytes()}})
    full = os.statvfs_result((4096, 4096, 1, 1, 1, 1, 1, 1, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(StorageFailed, match="are free: free some space"):
        pull("o/m")
    assert hub.ranges == []


def test_a_disk_that_fills_up_keeps_what_came(served, home, model, monkeypatch):
    served({"o/m": {"a.gguf": model.read_bytes()}})
    write = hub_module._Counted.write

    def full(self, data):
        if self.tell() > 4 * CHUNK_BYTES:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(hub_module._Counted, "write", full)
    with pytest.raises(StorageFailed, match=r"the disk is full: free some space.*resumes where it stopped"):
        pull("o/m")
    assert downloads(home) == ["a.gguf.partial"]
    monkeypatch.undo()


def test_a_file_the_hub_gives_only_in_its_own_protocol(served, model, monkeypatch):
    served({"o/m": {"a.gguf": model.read_bytes()}})
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 1000)
    with pytest.raises(StorageFailed, match="comes in shards"):
        pull("o/m")


def test_abandoned_downloads_are_removed_and_others_are_not(served, home, model):
    served({"o/m": {"a.gguf": model.read_bytes()}})
    for name, age in (("old", 1.1), ("young", 0.9)):
        folder = home / "downloads" / name
        folder.mkdir(parents=True)
        (folder / f"{name}.partial").write_bytes(b"x")
        when = time.time() - age * hub_module.KEEP_SECONDS
        os.utime(folder, (when, when))
    pull("o/m")
    assert downloads(home) == ["young.partial"]


def test_two_processes_do_not_fetch_the_same_at_once(served, home, model):
    hub = served({"o/m": {"a.gguf": model.read_bytes()}})
    key = hashlib.sha256(hashlib.sha256(model.read_bytes()).hexdigest().encode()).hexdigest()[:32]
    (home / "downloads" / key).mkdir(parents=True)
    other = os.open(home / "downloads" / key, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(StorageFailed, match=r"Another process is fetching o/m/a\.gguf"):
        pull("o/m")
    assert hub.ranges == []
    os.close(other)
    pull("o/m")


def test_a_card_is_fetched_from_its_source_under_its_name(served, model):
    served({"ggml-org/gpt-oss-20b-GGUF": {"gpt-oss-20b-mxfp4.gguf": model.read_bytes()}})
    stored = pull("gpt-oss-20b")
    assert (stored.name, stored.source) == (
        "gpt-oss-20b",
        "ggml-org/gpt-oss-20b-GGUF/gpt-oss-20b-mxfp4.gguf",
    )


def test_a_card_whose_model_is_installed_needs_no_network(home, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    installed = tmp_path / "share" / "cordee" / "starter.gguf"
    installed.parent.mkdir(parents=True)
    installed.write_bytes(model.read_bytes())
    stored = pull("starter")
    assert stored.name == "starter"
    assert stored.path.samefile(installed)


def test_an_unknown_model_with_a_card_says_how_to_get_it(home):
    with pytest.raises(ModelNotFound, match="`cordee pull gpt-oss-20b` fetches it"):
        Store().get("gpt-oss-20b")


def test_every_card_is_complete_and_of_an_architecture_that_can_be_cut():
    assert "starter" in cards()
    for name, card in cards().items():
        assert card.name == name
        assert roster()[card.architecture].certified, name
        # A checkpoint has no quantization to choose.
        assert card.file or re.fullmatch(r"[\w.-]+/[\w.-]+(:\w+)?", card.source), name
        assert 0 < card.active_parameters <= card.parameters, name
        assert card.layers > 0 < card.context, name
        assert all(re.fullmatch("[a-z]{2}", language) for language in card.languages), name
        assert card.title and card.license and card.notes, name


def test_the_starters_card_tells_the_truth(starter_path):
    header, card = read_header(starter_path), cards()["starter"]
    assert (header.architecture, header.layers) == (card.architecture, card.layers)
    assert header.get(".context_length") == card.context
