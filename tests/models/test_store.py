"""The model store: content once, names that cannot leave it, and nothing half-written whatever happens."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.errors import BadModelFile, BadRequest, ModelNotFound, StorageFailed, UnsupportedModel
from cordee.models import store as store_module
from cordee.models.gguf import read_header
from cordee.models.store import Store
from shards import write_shards
from tiny import make_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models with different content, in files a.gguf and b.gguf."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny("llama", folder / "a.gguf", seed=1)
    make_tiny("qwen3", folder / "b.gguf", seed=2)
    return folder


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def files(store: Store) -> list[str]:
    """Every file in the store but its lock, and every folder of work in progress."""
    found = [path for path in store.root.rglob("*") if path.is_file() and path.name != ".lock"]
    return sorted(
        str(path.relative_to(store.root)) for path in [*found, *(store.root / "incoming").iterdir()]
    )


def sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_a_model_is_there_under_its_name_with_its_content(store, models):
    added = store.add_file(models / "a.gguf", "first")
    assert store.get("first") == added
    assert store.list() == [added]
    assert added.path.read_bytes() == (models / "a.gguf").read_bytes()
    assert added.digest == sha256(models / "a.gguf")
    assert (added.architecture, added.layers) == ("llama", 6)
    assert added.source == str(models / "a.gguf")
    assert Store(store.root).get("first") == added


def test_the_state_folder_is_where_the_store_is(home):
    assert Store().root == home / "models"


def test_the_same_content_is_kept_once_until_its_last_name_goes(store, models):
    one, two = (store.add_file(models / "a.gguf", name) for name in ("one", "two"))
    other = store.add_file(models / "b.gguf", "other")
    assert one.path == two.path
    assert len(list((store.root / "blobs").iterdir())) == 2
    kept = store.slice_for(one, 0, 2)
    store.set_note(one.digest, "build", True)
    store.remove("one")
    assert store.get("two").path.exists()
    assert kept.path.exists()
    store.remove("two")
    assert files(store) == sorted([f"blobs/{other.path.name}", "names/other.json"])


def test_a_name_given_again_stands_for_the_new_model_and_the_old_one_goes(store, models):
    old = store.add_file(models / "a.gguf", "mine")
    new = store.add_file(models / "b.gguf", "mine")
    assert store.get("mine") == new
    assert not old.path.exists()


def test_later_edits_of_the_users_file_do_not_reach_the_store(store, models, tmp_path):
    own = tmp_path / "own.gguf"
    own.write_bytes((models / "a.gguf").read_bytes())
    added = store.add_file(own, "mine")
    with own.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    assert sha256(added.path) == added.digest != sha256(own)


def test_a_linked_file_takes_no_room_and_a_moved_one_is_gone(store, models, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes((models / f"{name}.gguf").read_bytes())
    linked = store.add_file(tmp_path / "a", "linked", take="link")
    assert linked.path.samefile(tmp_path / "a")
    moved = store.add_file(tmp_path / "b", "moved", take="move")
    assert not (tmp_path / "b").exists()
    assert (linked.digest, moved.digest) == (sha256(models / "a.gguf"), sha256(models / "b.gguf"))


def test_where_links_cannot_be_made_the_file_is_copied(store, models, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    added = store.add_file(models / "a.gguf", "mine", take="link")
    assert sha256(added.path) == added.digest == sha256(models / "a.gguf")


def test_a_set_of_shards_becomes_one_model(store, models, tmp_path):
    header = read_header(models / "a.gguf")
    first = write_shards(header, tmp_path)
    merged = store.add_file(first, "whole")
    tensors = read_header(merged.path).tensors
    assert {tensor.name for tensor in tensors} == {tensor.name for tensor in header.tensors}
    assert read_header(merged.path).get("split.count") is None
    assert sha256(merged.path) == merged.digest
    assert merged.nbytes == merged.path.stat().st_size


def test_bad_files_are_refused_before_anything_is_copied(store, models, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_take_in", lambda *_: pytest.fail("copied"))
    (tmp_path / "text.gguf").write_text("I am no model, but I am long enough to be taken for one.")
    (tmp_path / "cut.gguf").write_bytes((models / "a.gguf").read_bytes()[:-100])
    for name in ("text.gguf", "cut.gguf", "missing.gguf"):
        with pytest.raises(BadModelFile, match=name):
            store.add_file(tmp_path / name, "bad")
    assert files(store) == []


def test_a_file_that_grows_meanwhile_is_refused(store, models, tmp_path):
    path = tmp_path / "growing.gguf"
    path.write_bytes((models / "a.gguf").read_bytes())

    def grow(done, total):
        if done == total:
            with path.open("ab") as file:
                file.write(b"more")

    with pytest.raises(BadModelFile, match="changed"):
        store.add_file(path, "mine", grow)
    assert files(store) == []


def test_progress_ends_at_the_size_of_the_file(store, models, monkeypatch):
    monkeypatch.setattr(store_module, "COPY_BYTES", 1 << 16)
    calls = []
    added = store.add_file(models / "a.gguf", "mine", lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert len(calls) > 2
    assert calls[-1] == (added.nbytes, added.nbytes)


@given(st.text(max_size=80))
def test_no_name_leads_out_of_the_store(tmp_path_factory, name):
    store = Store(tmp_path_factory.getbasetemp() / "names")
    try:
        path = store._name_path(name)
    except BadRequest:
        return
    assert path.resolve().parent == (store.root / "names").resolve()
    assert not path.name.startswith(".")
    assert len(os.fsencode(path.name)) <= 255


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "/etc/passwd", "-rf", "a b", "a\nb", "a\0", "é" * 99]
)
def test_invalid_names_are_refused(store, models, name):
    for act in (store.get, store.remove, lambda name: store.add_file(models / "a.gguf", name)):
        with pytest.raises(BadRequest, match="cannot name"):
            act(name)
    assert files(store) == []


@pytest.mark.parametrize("name", ["starter", "owner/name:Q4_K_M", "qwen3-0.6b", "modèle", "x/../y", "名前"])
def test_names_of_all_kinds_come_back(store, models, name):
    store.add_file(models / "a.gguf", name)
    assert [model.name for model in store.list()] == [name]
    assert store.get(name).name == name
    store.remove(name)
    assert files(store) == []


def test_an_unknown_name_gets_the_close_ones_or_what_to_do(store, models):
    with pytest.raises(ModelNotFound, match="cordee pull"):
        store.get("starter")
    store.add_file(models / "a.gguf", "starter")
    with pytest.raises(ModelNotFound, match="did you mean starter"):
        store.get("startr")
    with pytest.raises(ModelNotFound, match="did you mean starter"):
        store.remove("startr")


def test_a_file_that_vanished_or_shrank_is_named_with_the_remedy(store, models):
    model = store.add_file(models / "a.gguf", "mine")
    remedy = f"cordee pull {models / 'a.gguf'} --name mine"
    os.truncate(model.path, 100)
    with pytest.raises(BadModelFile, match=remedy):
        store.get("mine")
    model.path.unlink()
    with pytest.raises(BadModelFile, match=remedy):
        store.get("mine")
    store.add_file(models / "a.gguf", "mine")
    assert sha256(store.get("mine").path) == model.digest


def test_a_damaged_entry_is_named_and_costs_nobody_their_model(store, models):
    mine = store.add_file(models / "a.gguf", "mine")
    damaged = store.root / "names" / "other.json"
    damaged.write_bytes(b'{"name": "other", "digest": "sha256:../../x"')
    for act in (store.list, lambda: store.get("other")):
        with pytest.raises(StorageFailed, match=r"other\.json is damaged"):
            act()
    store.add_file(models / "b.gguf", "third")
    store.remove("third")
    assert store.get("mine") == mine
    damaged.write_bytes(damaged.read_bytes() + b', "nbytes": 1, "source": "", "added": "", ' + TAIL)
    with pytest.raises(StorageFailed, match="not a digest"):
        store.get("other")


TAIL = b'"architecture": "llama", "layers": 1}'


def test_a_slice_is_cut_once(store, models, monkeypatch):
    model = store.add_file(models / "a.gguf", "mine")
    fresh = store.slice_for(model, 2, 4)
    assert sha256(fresh.path) == fresh.digest
    assert read_header(fresh.path).layers == 2
    monkeypatch.setattr(store_module, "cut", lambda *_, **__: pytest.fail("cut again"))
    assert Store(store.root).slice_for(model, 2, 4) == fresh


def test_all_layers_are_the_stored_file_itself(store, models):
    model = store.add_file(models / "a.gguf", "mine")
    whole = store.slice_for(model, 0, 6)
    assert (whole.path, whole.digest, whole.nbytes) == (model.path, model.digest, model.nbytes)


@pytest.mark.parametrize("fault", ["shorter", "other header", "gone", "no note", "damaged note"])
def test_a_slice_that_is_not_what_a_cut_would_give_is_cut_again(store, models, fault):
    model = store.add_file(models / "a.gguf", "mine")
    kept = store.slice_for(model, 2, 4)
    note = kept.path.with_suffix(".json")
    if fault == "shorter":
        os.truncate(kept.path, kept.nbytes - 1)
    elif fault == "other header":
        data = bytearray(kept.path.read_bytes())
        data[100] ^= 1
        kept.path.write_bytes(data)
    elif fault == "damaged note":
        note.write_text("{")
    else:
        {"gone": kept.path, "no note": note}[fault].unlink()
    assert store.slice_for(model, 2, 4) == kept
    assert sha256(kept.path) == kept.digest


def test_a_disk_that_loses_bytes_is_noticed(store, models, monkeypatch):
    model = store.add_file(models / "a.gguf", "mine")
    before = files(store)
    monkeypatch.setattr(store_module, "_digest", lambda *_: "sha256:" + "0" * 64)
    with pytest.raises(StorageFailed, match="check the disk"):
        store.slice_for(model, 2, 4)
    assert files(store) == before


def test_a_model_removed_while_it_is_cut_leaves_no_slice(store, models):
    model = store.add_file(models / "a.gguf", "mine")

    def removed(done, total):
        if done == total:
            store.remove("mine")

    with pytest.raises(ModelNotFound, match="mine"):
        store.slice_for(model, 2, 4, progress=removed)
    assert files(store) == []


def test_a_forced_slice_is_not_given_to_a_caller_that_did_not_force(store, tmp_path):
    path = make_tiny("llama", tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lxxma"))
    model = store.add_file(path, "odd")
    store.slice_for(model, 2, 4, force=True)
    with pytest.raises(UnsupportedModel, match="nobody has checked"):
        store.slice_for(model, 2, 4)


def test_what_was_found_out_about_a_model_is_kept_with_it(store, models):
    model = store.add_file(models / "a.gguf", "mine")
    assert store.note(model.digest, "build 1") is None
    store.set_note(model.digest, "build 1", {"batch_invariant": True})
    store.set_note(model.digest, "build 2", "no")
    assert Store(store.root).note(model.digest, "build 1") == {"batch_invariant": True}
    assert store.note(model.digest, "build 2") == "no"
    store.remove("mine")
    assert store.note(model.digest, "build 1") is None


CHILD = """
    import sys
    from cordee.models.store import Store
    import cordee.models.store as module
    module.COPY_BYTES = 1 << 12
    root, path, name, halt = sys.argv[1:]
    def progress(done, total):
        if halt == "halfway" and done > total // 2:
            print("half", flush=True)
            sys.stdin.read()
    store = Store(root)
    for _ in range(1 if halt == "halfway" else 15):
        model = store.add_file(path, name, progress)
        store.slice_for(model, 1, 3)
        if halt == "remove":
            store.remove(name)
"""


def child(store: Store, path: Path, name: str, halt: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), store.root, path, name, halt]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(store, models):
    mine = store.add_file(models / "b.gguf", "mine")
    before = files(store)
    with child(store, models / "a.gguf", "killed", "halfway") as process:
        assert process.stdout.readline() == "half\n"
        half = set(files(store)) - set(before)
        store.slice_for(mine, 2, 4)  # sweeps, but not what a living process holds
        assert half <= set(files(store))
        process.send_signal(signal.SIGKILL)
    assert [model.name for model in store.list()] == ["mine"]
    assert half <= set(files(store))
    store.add_file(models / "b.gguf", "mine")
    assert not half & set(files(store))


def test_several_processes_may_add_cut_and_remove_at_once(store, models):
    jobs = [("a", "x", "remove"), ("a", "x", "keep"), ("a", "y", "remove"), ("b", "z", "keep")]
    processes = [child(store, models / f"{file}.gguf", name, halt) for file, name, halt in jobs]
    complaints = [process.communicate()[1] for process in processes]
    # Where two fight about one name, one may find that the other has just removed it.
    gone = ("ModelNotFound", "No such file")
    assert all(not text or any(word in text for word in gone) for text in complaints), complaints
    for model in store.list():
        assert sha256(store.get(model.name).path) == model.digest
    assert store.get("z").digest == sha256(models / "b.gguf")
    assert list((store.root / "incoming").iterdir()) == []


def test_a_lock_that_is_never_released_is_not_waited_for_without_end(store, models, monkeypatch):
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    model = store.add_file(models / "a.gguf", "mine")
    faults = []

    def note():
        try:
            store.set_note(model.digest, "key", 1)
        except StorageFailed as error:
            faults.append(error.message)

    with store._lock():
        thread = threading.Thread(target=note)
        thread.start()
        thread.join()
    assert "Another process has locked" in faults[0]


def test_a_full_disk_stores_nothing(models, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system of its own takes the rights to mount one")
    try:
        store = Store(small / "store")
        with pytest.raises(StorageFailed, match="free some space"):
            store.add_file(models / "a.gguf", "mine")
        assert files(store) == []
        assert store.list() == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_root_that_cannot_be_made_names_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="file/store cannot be created"):
        Store(tmp_path / "file" / "store")
