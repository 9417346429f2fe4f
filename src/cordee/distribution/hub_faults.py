"""What goes wrong between this machine and the model hub, as expected errors with a remedy each."""

import os
import socket
import ssl
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import msgspec
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of whichever HTTP library it uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from cordee.errors import (
    BadRequest,
    CordeeError,
    HubUnreachable,
    ModelNotFound,
    SetupNeeded,
    StorageFailed,
)
from cordee.files import storage_failed

# Variables that name certificates. The client reads the first two, other programs the third; whoever set one
# that leads nowhere means a certificate that is missing now.
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


@contextmanager
def hub_faults(repository: str) -> Generator[None]:
    """Turn what goes wrong between us and the hub into expected errors.

    Raises:
        SetupNeeded: the proxy, the certificates or the token of this machine cannot be used.
        ModelNotFound: the repository or the file is not there.
        BadRequest: this cannot be the name of a repository.
        HubUnreachable: it cannot be reached, or what answers is not the hub.
        StorageFailed: it refuses, or the disk does.
    """
    try:
        _require_endpoint()
        _require_certificates()
        _require_proxies()
        _require_token()
        yield
    except HFValidationError as error:
        raise BadRequest(
            f"{repository} cannot be the name of a repository (owner/name).", "source"
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(repository, error) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise _unreachable(repository, error) from error
    except msgspec.MsgspecError as error:
        raise HubUnreachable(
            f"What answers at {constants.ENDPOINT} is not the hub (perhaps the log-in page of this "
            "network, or a proxy): open that address in a browser, then try again."
        ) from error
    except ssl.SSLError as error:  # when the client reads them; in a connection it is another error's cause
        raise SetupNeeded(
            "The certificates that SSL_CERT_FILE or SSL_CERT_DIR names cannot be read "
            f"({_first_line(error)}): put certificates in PEM format there, or unset it."
        ) from error
    except OSError as error:
        if error.errno is None:  # http_get: the connection ended early or the size is wrong
            raise HubUnreachable(
                f"{repository} came incomplete: try again; it resumes where it stopped."
            ) from error
        stored = storage_failed(repository, error).message.rstrip(".")
        raise StorageFailed(f"{stored}; it resumes where it stopped.") from error


def _require_endpoint() -> None:
    if not _is_address(constants.ENDPOINT, ("http", "https")):
        raise SetupNeeded(
            f"HF_ENDPOINT is {constants.ENDPOINT!r}, which is no address of a hub: write https://HOST, or "
            "`unset HF_ENDPOINT`."
        )


def _require_certificates() -> None:
    for name in CERTIFICATES:
        paths = os.environ.get(name, "").split(os.pathsep)  # OpenSSL takes several folders
        if paths != [""] and not any(os.access(path, os.R_OK) for path in paths):
            raise SetupNeeded(
                f"{name} names {os.environ[name]}, where there are no certificates to read: put them "
                f"there, or `unset {name}`."
            )


def _require_proxies() -> None:
    """Refuse proxies that the client cannot use: it raises errors of many kinds for them."""
    proxies = getproxies()
    if proxies.get("no") == "*":  # the client then looks at no other
        return
    for kind in ("http", "https", "all"):
        if kind not in proxies:
            continue
        name = f"{kind}_proxy" if f"{kind}_proxy" in os.environ else f"{kind.upper()}_PROXY"
        proxy = proxies[kind] if "://" in proxies[kind] else f"http://{proxies[kind]}"
        scheme = proxy.partition("://")[0].lower()
        if scheme not in PROXY_SCHEMES:
            known = "socks5" if scheme.startswith("socks") else "http"
            raise SetupNeeded(
                f"The proxy in {name} has the scheme {scheme!r}, which is not known: write "
                f"{known}://HOST:PORT, or `unset {name}`."
            )
        if not _is_address(proxy, PROXY_SCHEMES):
            raise SetupNeeded(
                f"The proxy in {name} is no address: write http://HOST:PORT, or `unset {name}`."
            )
        if scheme.startswith("socks") and not _speaks_socks():
            pip = Path(sys.prefix) / "bin" / "pip"
            raise SetupNeeded(
                f"The proxy in {name} speaks SOCKS, for which a package is missing: `{pip} install "
                f"socksio`; or set {name} to an HTTP proxy, or `unset {name}`."
            )


def _is_address(text: str, schemes: tuple[str, ...]) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # its port is no number, or a bracket is not closed
        return False


def _speaks_socks() -> bool:
    try:
        import socksio  # noqa: F401 # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError:
        return False
    return True


def _require_token() -> None:
    """Refuse a token that cannot be in the header of a request; tokens are ASCII without spaces."""
    try:
        token = get_token()
    except (OSError, ValueError) as error:  # the file cannot be read, or is not text
        raise SetupNeeded(
            f"The hub's token cannot be read from {constants.HF_TOKEN_PATH} ({error}): remove that file, "
            "or set HF_TOKEN."
        ) from error
    if token and not all("!" <= letter <= "~" for letter in token):
        raise SetupNeeded(
            f"The hub's token, from {_token_place()}, has characters that no token has: copy it again from "
            f"{constants.ENDPOINT}/settings/tokens."
        )


def _token_place() -> str:
    """Where the token comes from."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return next((name for name in names if os.environ.get(name)), str(constants.HF_TOKEN_PATH))


def _refusal(repository: str, error: HfHubHTTPError) -> CordeeError:
    """What the hub's refusal means. It gives 401 without a token, or with a wrong one, for many of them."""
    status, hub = error.response.status_code, constants.ENDPOINT
    has_token = bool(get_token())
    if isinstance(error, GatedRepoError):
        own = (
            f"with the account of the token from {_token_place()}, and wait until you are let in"
            if has_token
            else "then set HF_TOKEN to one of your tokens"
        )
        return StorageFailed(
            f"{repository} is only for those who agree to its terms: do so on {hub}/{repository}, {own}."
        )
    if status == 401 and has_token:
        return StorageFailed(
            f"The hub does not accept the token from {_token_place()}: make a new one on "
            f"{hub}/settings/tokens, or do without (models that are open to all need none)."
        )
    if isinstance(error, RepositoryNotFoundError):
        private = "let the token's account see it" if has_token else "set HF_TOKEN"
        return ModelNotFound(
            f"The hub has no {repository}: check the spelling of owner and name. If it is private, {private}."
        )
    if isinstance(error, EntryNotFoundError) or status == 404:
        return ModelNotFound(
            f"{repository} on the hub no longer has what was asked for: check the spelling, or try again; "
            "its files may have just been replaced."
        )
    if status == 407:
        return SetupNeeded(
            f"The proxy wants a name and a password ({_first_line(error)}): write them into HTTPS_PROXY, "
            "as in http://name:password@host:port."
        )
    if status == 429:
        return HubUnreachable(
            f"{repository} cannot be fetched from {hub} just now (429, too many requests): try again in "
            "some minutes; it resumes where it "
            f"stopped{'' if has_token else ', and with a token in HF_TOKEN the hub allows more'}."
        )
    if status >= 500:
        return HubUnreachable(
            f"{repository} cannot be fetched from {hub}, which has a fault of its own ({status}): try "
            "again later; it resumes where it stopped."
        )
    return StorageFailed(
        f"The hub refuses {repository} ({error.server_message or _first_line(error)}): open "
        f"{hub}/{repository} in a browser, which says more."
    )


def _unreachable(repository: str, error: BaseException) -> CordeeError:
    """Why there was no answer at all."""
    hub, causes = constants.ENDPOINT, list(_causes(error))
    if isinstance(error, OfflineModeIsEnabled):
        return HubUnreachable(
            f"{repository} is not fetched, because HF_HUB_OFFLINE is set (offline mode): `unset "
            "HF_HUB_OFFLINE`."
        )
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return HubUnreachable(
            f"The certificate of {hub} is not trusted here ({_first_line(causes[-1])}): check this "
            "machine's clock. If your organisation inspects what is encrypted, set SSL_CERT_FILE to the "
            "file with its certificate."
        )
    if any(isinstance(cause, socket.gaierror) for cause in causes):
        return HubUnreachable(
            f"There is no way to {hub} from here (its name is not known): check the network connection, "
            f"then try again; {repository} resumes where it stopped. Without internet, copy the file here "
            "and `cordee pull FILE`."
        )
    return HubUnreachable(
        f"{repository} cannot be fetched from {hub} ({_first_line(error)}): check the connection"
        f"{' and the proxy' if getproxies() else ''}, then try again; it resumes where it stopped."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, the innermost last."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
