"""What people write for a model: addresses of the hub as browsers show them, paths that lead nowhere."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.distribution.pull import hub_files, hub_name, is_on_hub, pull
from cordee.distribution.source import HubModelName, hub_model_name
from cordee.errors import BadModelFile, BadRequest, CordeeError, ModelNotFound
from cordee.models.store import Store
from fake_hub import FakeHub
from tiny import make_tiny

M = HubModelName("owner/my-model")
Q4 = HubModelName("owner/my-model", "Q4_K_M")
FILE = HubModelName("owner/my-model", None, "sub/my model-Q4.gguf")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("owner/my-model", M),
        ("owner/my-model/", M),
        (" owner/my-model\n", M),
        ("https://huggingface.co/owner/my-model", M),
        ("https://huggingface.co/owner/my-model/", M),
        ("HTTPS://HuggingFace.co/owner/my-model", M),
        ("http://huggingface.co/owner/my-model", M),
        ("<https://huggingface.co/owner/my-model>", M),
        ("huggingface.co/owner/my-model", M),
        ("hf.co/owner/my-model", M),
        ("https://hf.co/owner/my-model?library=gguf#files", M),
        ("hf://owner/my-model", M),
        ("https://huggingface.co/models/owner/my-model", M),
        ("https://huggingface.co/api/models/owner/my-model", M),
        ("https://huggingface.co/owner/my-model/tree/main", M),
        ("https://huggingface.co/owner/my-model/blob/main/README.md", M),
        ("https://huggingface.co/owner/my-model/discussions/3", M),
        ("owner/my-model/tree/main", M),
        ("owner/my-model:Q4_K_M", Q4),
        ("hf.co/owner/my-model:Q4_K_M", Q4),
        ("https://huggingface.co/owner/my-model:Q4_K_M", Q4),
        ("owner/my-model/sub/my model-Q4.gguf", FILE),
        ("https://huggingface.co/owner/my-model/blob/main/sub/my%20model-Q4.gguf", FILE),
        ("https://huggingface.co/owner/my-model/resolve/main/sub/my%20model-Q4.gguf?download=true", FILE),
        ("https://hf.co/owner/my-model/raw/main/sub/my%20model-Q4.gguf", FILE),
        ("https://huggingface.co/owner/my-model?show_file_info=sub%2Fmy+model-Q4.gguf", FILE),
        ("owner/my-model/resolve/main/sub/my model-Q4.gguf", FILE),
        ("hf://owner/my-model/sub/my model-Q4.gguf", FILE),
        ("owner/my-model/A.GGUF", HubModelName("owner/my-model", None, "A.GGUF")),
        ("starter", None),
        ("", None),
        ("/owner/my-model", None),
        ("owner", None),
    ],
)
def test_a_model_of_the_hub_however_it_is_written(source: str, named: HubModelName | None) -> None:
    assert hub_model_name(source) == named
    assert is_on_hub(source) == (named is not None)


def test_the_hosts_are_the_hubs_and_that_of_the_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.school.example")
    assert hub_model_name("https://hub.school.example/owner/my-model") == M
    assert hub_model_name("hub.school.example/owner/my-model") == M
    assert hub_name("https://huggingface.co/owner/my-model-GGUF") == "my-model"


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("https://ollama.com/library/llama3", "not on the hub .*: download the file with a browser"),
        ("https://github.com/owner/my-model/releases/m.gguf", "not on the hub"),
        ("ftp://192.168.1.2/m.gguf", "not on the hub"),
        ("https://huggingface.co/datasets/owner/texts", "is a data set, not a model"),
        ("https://huggingface.co/spaces/owner/chat", "is a space, not a model"),
        ("https://huggingface.co/owner/my-model/blob/v2/m.gguf", "of the revision 'v2'"),
        ("https://huggingface.co/owner", "does not name a model .*/owner/name"),
        ("https://huggingface.co/", "does not name a model"),
        ("https://[::1", "not on the hub|does not name a model"),
    ],
)
def test_an_address_of_something_else_says_what_it_is(home: Path, source: str, sentence: str) -> None:
    for use in (pull, hub_name, hub_files):
        with pytest.raises(BadRequest, match=sentence):
            use(source)


def test_a_pasted_address_is_pulled(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = make_tiny("llama", tmp_path / "tiny.gguf").read_bytes()
    hub = FakeHub({"o/m-GGUF": {"a.gguf": b"x", "Q2_K/b.gguf": content}})
    hub.page_files = 1
    hub.use(monkeypatch, tmp_path)
    try:
        stored = pull(f"{hub.endpoint}/o/m-GGUF/resolve/main/Q2_K/b.gguf?download=true")
        assert (stored.name, stored.source) == ("m", "o/m-GGUF/Q2_K/b.gguf")
        with pytest.raises(BadRequest, match=r"several models: say which, as in o/m-GGUF/Q2_K/b\.gguf"):
            pull("https://huggingface.co/o/m-GGUF")
        assert hub.strange == []
    finally:
        hub.close()


NAMES = st.text(st.characters(codec="utf-8"), max_size=40)


@given(st.one_of(NAMES, st.builds("https://huggingface.co/{}/{}?{}#{}".format, NAMES, NAMES, NAMES, NAMES)))
def test_any_text_names_a_model_or_is_refused_in_a_sentence(source: str) -> None:
    try:
        named = hub_model_name(source)
    except BadRequest as error:
        assert error.message.endswith((".", "?"))
    else:
        assert named is None or re.fullmatch(r"[\w.-]+/[\w.-]+", named.repository)


# Files on this machine


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model in it and one in `models`, and a hub that must not be asked."""
    here = tmp_path / "here"
    (here / "models").mkdir(parents=True)
    make_tiny("llama", here / "mistral.gguf")
    make_tiny("llama", here / "models" / "qwen.gguf")
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return here


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("./mistrl.gguf", r"no file mistrl\.gguf: did you mean mistral\.gguf\?"),
        ("mistral.ggfu", r"no file mistral\.ggfu: did you mean mistral\.gguf\?"),
        ("mistral.GUFF", r"did you mean mistral\.gguf\?"),
        ("~/mistral", r"no file /.*/mistral: did you mean /.*/mistral\.gguf\?"),
        ("~nobody-of-this-name/mistral.gguf", "no folder ~nobody-of-this-name"),
        ("models/qwn.gguf", r"did you mean models/qwen\.gguf\?"),
        ("models/qwen.ggfu", r"did you mean models/qwen\.gguf\?"),
        ("/no/such/folder/model.gguf", "no folder /no/such/folder: check the path"),
        ("../elsewhere/m.gguf", r"no folder \.\./elsewhere"),
        ("models", r"models is a folder.* such as models/qwen\.gguf"),
        ("./models/", r"models is a folder.* such as models/qwen\.gguf"),
        (r"C:\Users\Ada Byron\model.gguf", "as Windows writes it.*'/mnt/c/Users/Ada Byron/model.gguf'"),
        ("D:/models/model.gguf", r"under WSL.*`cordee pull /mnt/d/models/model\.gguf`"),
        (r"models\qwen.gguf", r"as Windows writes it; here it would be models/qwen\.gguf"),
        (r"\\server\share\model.gguf", "as Windows writes it"),
    ],
)
def test_a_mistyped_path_is_not_asked_of_the_hub(folder: Path, source: str, sentence: str) -> None:
    with pytest.raises(ModelNotFound, match=sentence):
        pull(source)
    assert Store().list() == []


def test_what_may_be_a_file_or_a_repository_is_asked_of_the_hub_and_both_are_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = make_tiny("llama", tmp_path / "tiny.gguf").read_bytes()
    hub = FakeHub({"o/m.GGUF": {"a.gguf": content}})
    hub.use(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        assert pull("o/m.GGUF").source == "o/m.GGUF/a.gguf"
        with pytest.raises(ModelNotFound, match=rf"no o/n\.gguf.* Nor is there a file {tmp_path}/o/n"):
            pull("o/n.gguf")
    finally:
        hub.close()


@pytest.mark.parametrize("source", ["/" + "x" * 300 + ".gguf", "./" + "长" * 100 + ".gguf", "y" * 5000])
def test_a_name_that_no_file_can_have(folder: Path, source: str) -> None:
    with pytest.raises(CordeeError, match=r"name too long|is not a file"):
        pull(source)


@pytest.mark.parametrize(
    "name", [b"caf\xe9 na\xefve.gguf", b"\xff\xfe.gguf", ("模型" * 41).encode() + b".gguf"]
)
def test_a_file_whose_name_is_any_bytes_gets_a_name_and_can_be_listed(folder: Path, name: bytes) -> None:
    path = (folder / "mistral.gguf").rename(folder / os.fsdecode(name))
    stored = pull(str(path))
    assert [model.name for model in Store().list()] == [stored.name]
    assert Store().get(stored.name).source.encode().endswith(b".gguf")


def test_a_file_that_may_not_be_read_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = folder / "loop.gguf"
    loop.symlink_to(loop)
    with pytest.raises(BadModelFile, match=r"loop\.gguf cannot be read \(Too many levels"):
        pull("./loop.gguf")
