"""What stands between this machine and the hub: each fault has its own sentence, remedy and exit code."""

import errno
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from huggingface_hub import close_session, constants

from cordee.distribution import hub as hub_module
from cordee.distribution.hub_faults import CERTIFICATES
from cordee.distribution.pull import hub_files, pull
from cordee.errors import (
    CordeeError,
    HubUnreachable,
    ModelNotFound,
    SetupNeeded,
    StorageFailed,
)
from cordee.files import STORAGE_FAULTS, atomic_file
from fake_hub import FakeHub
from terminal import PROGRAM, SECONDS


@pytest.fixture(autouse=True)
def _new_client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The client reads proxies and certificates when it is made."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", *CERTIFICATES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    close_session()
    yield
    close_session()


@pytest.fixture
def hub(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub({"o/m": {"a.gguf": b"x"}})
    hub.use(monkeypatch, tmp_path)
    yield hub
    hub.close()


# What this machine is set to


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1080", r"in ALL_PROXY speaks SOCKS.*pip install socksio"),
        ("https_proxy", "socks5h://proxy:1080", r"in https_proxy speaks SOCKS"),
        ("all_proxy", "socks://127.0.0.1:1080", r"scheme 'socks', .*write socks5://HOST:PORT"),
        ("HTTPS_PROXY", "socks4://127.0.0.1:1080", r"scheme 'socks4', .*write socks5://HOST:PORT"),
        ("HTTP_PROXY", "ftp://proxy", r"scheme 'ftp', .*write http://HOST:PORT"),
        ("HTTPS_PROXY", "http://proxy:eight", "in HTTPS_PROXY is no address"),
        ("HTTPS_PROXY", "http://[::1", "in HTTPS_PROXY is no address"),
        ("HTTPS_PROXY", "http://", "in HTTPS_PROXY is no address"),
        ("SSL_CERT_FILE", "/no/such/file.pem", r"SSL_CERT_FILE names /no/such/file\.pem, where .*unset"),
        ("REQUESTS_CA_BUNDLE", "/no/such/file.pem", "REQUESTS_CA_BUNDLE names /no/such"),
        ("SSL_CERT_DIR", "/no/such:/nor/such", "SSL_CERT_DIR names /no/such:/nor/such"),
        ("HF_TOKEN", "hf_é", r"from HF_TOKEN, has characters that no token has.*/settings/tokens"),
        ("HF_TOKEN", "Bearer hf_x", "from HF_TOKEN, has characters"),
        ("HUGGING_FACE_HUB_TOKEN", "“hf_x”", "from HUGGING_FACE_HUB_TOKEN, has characters"),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    for use in (pull, hub_files):
        with pytest.raises(SetupNeeded, match=sentence):
            use("o/m")
    assert hub.tokens == set(), "nothing was asked"


@pytest.mark.parametrize(
    "endpoint", ["hub.example", "ftp://hub.example", "https://", "http://hub:x", "file:///x"]
)
def test_an_address_of_the_hub_that_is_none(hub: FakeHub, monkeypatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(SetupNeeded, match=r"HF_ENDPOINT is .*write https://HOST"):
        pull("o/m")


@pytest.mark.parametrize("content", [b"hf_\xe9", "hf_ü".encode(), None])
def test_a_token_in_a_file_that_cannot_be_one(hub: FakeHub, tmp_path: Path, monkeypatch, content) -> None:
    place = tmp_path / "token"
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(place))
    if content is None:
        place.mkdir()
    else:
        place.write_bytes(content)
    with pytest.raises(SetupNeeded, match="/token"):
        pull("o/m")


def test_certificates_that_are_none(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nonsense.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nonsense.pem"))
    with pytest.raises(SetupNeeded, match=r"certificates that SSL_CERT_FILE .* cannot be read"):
        pull("o/m")


def test_settings_that_work_are_left_alone(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks://127.0.0.1:1080")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_TOKEN", " hf_x\n")
    assert [file.path for file in hub_files("o/m")] == ["a.gguf"]
    assert hub.tokens == {"Bearer hf_x"}


# What the hub refuses


@pytest.mark.parametrize(
    ("status", "code", "said", "token", "kind", "sentence"),
    [
        (
            401,
            "RepoNotFound",
            "Invalid username or password.",
            "",
            ModelNotFound,
            r"no o/m: .*spelling.*set HF_TOKEN",
        ),
        (
            404,
            "RepoNotFound",
            "Repository not found",
            "hf_x",
            ModelNotFound,
            r"no o/m: .*let the token's account see",
        ),
        (401, "GatedRepo", "Access restricted", "", StorageFailed, r"agree to its terms.*then set HF_TOKEN"),
        (403, "GatedRepo", "Not in the list", "hf_x", StorageFailed, r"terms.*token from HF_TOKEN.*let in"),
        (
            401,
            "",
            "Invalid credentials in Authorization header",
            "hf_x",
            StorageFailed,
            r"not accept the token from HF_TOKEN",
        ),
        (
            401,
            "RepoNotFound",
            "token has expired",
            "hf_x",
            StorageFailed,
            r"not accept the token from HF_TOKEN",
        ),
        (403, "", "Forbidden: the region", "", StorageFailed, r"refuses o/m \(Forbidden: the region\)"),
        (404, "EntryNotFound", "", "", ModelNotFound, "no longer has"),
        (407, "", "", "", SetupNeeded, "proxy wants a name and a password"),
        (429, "", "", "", HubUnreachable, r"429.*with a token in HF_TOKEN"),
        (429, "", "", "hf_x", HubUnreachable, r"429.*where it stopped\.$"),
        (503, "", "", "", HubUnreachable, r"fault of its own \(503\)"),
    ],
)
def test_each_refusal_has_its_own_sentence(
    hub: FakeHub,
    monkeypatch,
    status: int,
    code: str,
    said: str,
    token: str,
    kind: type[CordeeError],
    sentence: str,
) -> None:
    hub.status, hub.error_code, hub.error_message = status, code, said
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(kind, match=sentence) as caught:
        pull("o/m")
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    "page", [b"<html>Welcome to the guest network", b"", b"[1]", b'[{"path": 3}]', b'{"files": []}', b"\xff"]
)
def test_a_stranger_in_the_hubs_place(hub: FakeHub, page: bytes) -> None:
    hub.says = page
    with pytest.raises(HubUnreachable, match=r"not the hub .*log-in page.*in a browser"):
        pull("o/m")


# No way to the hub


def test_without_a_network_it_is_said_at_once(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    with pytest.raises(HubUnreachable, match=r"no way to http://hub\.invalid .*copy the file here"):
        pull("o/m")
    hub.close()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    with pytest.raises(HubUnreachable, match=r"refused.*check the connection, then"):
        pull("o/m")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachable, match="check the connection and the proxy"):
        pull("o/m")
    assert waits == []


def test_a_fault_of_the_hub_that_passes_is_waited_for(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 502
    monkeypatch.setattr(time, "sleep", lambda _: setattr(hub, "status", None))
    assert [file.path for file in hub_files("o/m")] == ["a.gguf"]


def test_a_hub_that_never_answers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "LIST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(HubUnreachable, match=r"timed out|imeout"):
            pull("o/m")


def test_a_certificate_that_nobody_vouches_for(home: Path, tmp_path: Path, monkeypatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own_certificate(tmp_path / "own.pem"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=shake_hands, args=(server, context), daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"https://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(HubUnreachable, match=r"not trusted here \(.*clock.*set SSL_CERT_FILE"):
            pull("o/m")
        thread.join()


def own_certificate(path: Path) -> Path:
    """A certificate that its own key has signed, and the key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "proxy of the school")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(1))
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(certificate + secret)
    return path


def shake_hands(server: socket.socket, context: ssl.SSLContext) -> None:
    connection, _ = server.accept()
    try:
        context.wrap_socket(connection, server_side=True).close()
    except ssl.SSLError:  # the client hangs up, as it should
        connection.close()


# What the disk refuses


@pytest.mark.parametrize("code", sorted(STORAGE_FAULTS))
def test_a_disks_refusal_says_what_it_is(hub: FakeHub, tmp_path: Path, monkeypatch, code: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(hub_module._Counted, "write", refuse)
    with pytest.raises(
        StorageFailed, match=r"^o/m cannot be written: .*resumes where it stopped\.$"
    ) as caught:
        pull("o/m")
    is_full = code in (errno.ENOSPC, errno.EDQUOT)
    assert ("free some space" in caught.value.message) == is_full
    with pytest.raises(StorageFailed) as caught, atomic_file(tmp_path / "answer"):
        refuse()
    assert ("free some space" in caught.value.message) == is_full


# The program


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:1080"}, 10, "speaks SOCKS"),
        ({"SSL_CERT_FILE": "/no/such/file.pem"}, 10, "SSL_CERT_FILE"),
        ({"HF_TOKEN": "hf_é"}, 10, "HF_TOKEN"),
        ({"HF_ENDPOINT": "http://hub.invalid"}, 7, "no way to http://hub.invalid"),
        ({"HF_ENDPOINT": "nonsense"}, 10, "HF_ENDPOINT"),
        ({"HF_HUB_OFFLINE": "1"}, 7, "HF_HUB_OFFLINE"),
    ],
)
def test_the_program_says_it_in_one_line(
    home: Path, environment: dict[str, str], code: int, words: str
) -> None:
    done = subprocess.run(
        [*PROGRAM, "pull", "o/m"],
        env={**os.environ, "CORDEE_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"} | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == code
    [line] = done.stderr.splitlines()
    assert line.startswith("cordee: ")
    assert words in line
    assert done.stdout == ""
