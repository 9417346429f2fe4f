"""What people write to name a model to be pulled: a file, a model of the hub, an address of its pages."""

import os
import re
import shlex
import stat
from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

from cordee.errors import BadModelFile, BadRequest, CordeeError, ModelNotFound, nearest
from cordee.files import expanded

# The hub's own hosts, beside that of HF_ENDPOINT.
HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co"}
# Parts of the hub's addresses: what stands before a revision and a file, and what comes first of other
# things.
VIEWS = {"blob", "resolve", "raw", "tree"}
NOT_MODELS = {
    "datasets": "a data set",
    "spaces": "a space",
    "collections": "a collection",
    "papers": "a paper",
}
MODEL_SUFFIX = ".gguf"
# A folder may hold millions of files; a name that was mistyped is looked for among so many.
LOOKED_AT = 10_000

_HUB = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(?::(?P<quantization>[\w.-]+)|/(?P<file>.+\.(?i:gguf)))?/?"
)
_ADDRESS = re.compile(r"(?:(?P<scheme>[a-z][a-z0-9+.-]*)://)?(?P<rest>.+)", re.IGNORECASE | re.DOTALL)
_WINDOWS = re.compile(r"(?P<drive>[A-Za-z]):[\\/]|\\\\|\.{0,2}[\w -]*\\")


@dataclass(frozen=True)
class HubModelName:
    """A model on the hub: in a `repository` ('owner/name'), of a `quantization` or in a `file`, if given."""

    repository: str
    quantization: str | None = None
    file: str | None = None


def hub_model_name(source: str) -> HubModelName | None:
    """The model on the hub that `source` names, or None if that is something else.

    That is 'owner/name', alone or with ':QUANTIZATION' or '/file.gguf' after it, or the address of one of the
    hub's pages or files, as browsers show and copy it.

    Raises:
        BadRequest: an address of something else than a model on the hub.
    """
    text = source.strip().strip("<>")
    host = _host(text)
    if host is not None:
        return _of_address(text, host)
    names = text.strip("/").split("/")
    if len(names) > 3 and names[2] in VIEWS:  # an address without its host
        return _of_names(text, names, None)
    match = _HUB.fullmatch(text)
    return HubModelName(match["repository"], match["quantization"], match["file"]) if match else None


def _host(text: str) -> str | None:
    """The host of an address, which lacks its scheme perhaps if it is the hub's; None if it is no address."""
    match = _ADDRESS.fullmatch(text)
    if match is None:
        return None
    first = match["rest"].partition("/")[0].partition(":")[0].lower()
    return first if match["scheme"] or first in _hosts() else None


def _hosts() -> set[str]:
    return HOSTS | {urlsplit(constants.ENDPOINT).hostname or ""}


def _of_address(text: str, host: str) -> HubModelName:
    match = _ADDRESS.fullmatch(text)
    assert match is not None, "it has a host"
    own_scheme = (match["scheme"] or "").lower() == "hf"  # hf://owner/name has no host
    if not own_scheme and host not in _hosts():
        raise BadRequest(
            f"{text} is not on the hub ({constants.ENDPOINT}), where models are fetched from: download the "
            "file with a browser, then `cordee pull FILE`.",
            "source",
        )
    try:
        parts = urlsplit(f"hub://{match['rest']}")
    except ValueError:
        raise _no_model(text) from None
    path = f"{parts.netloc}{parts.path}" if own_scheme else parts.path
    names = [unquote(name) for name in path.split("/") if name]
    shown = parse_qs(parts.query).get("show_file_info")  # the page of a repository, with a file's panel open
    if names and names[0] in NOT_MODELS:
        raise BadRequest(f"{text} is {NOT_MODELS[names[0]]}, not a model: name a model's page.", "source")
    names = names[1:] if names[:1] == ["api"] else names
    names = names[1:] if names[:1] == ["models"] else names
    return _of_names(text, names, shown[0] if shown else None)


def _of_names(text: str, names: list[str], shown: str | None) -> HubModelName:
    """The model of an address whose path has these `names`; `shown` is a file in its query."""
    repository, rest = "/".join(names[:2]), names[2:]
    if rest and rest[0] in VIEWS:
        if len(rest) > 1 and rest[1] != constants.DEFAULT_REVISION:
            raise BadRequest(
                f"{text} is of the revision {rest[1]!r}; only {constants.DEFAULT_REVISION!r} can be "
                "pulled: download the file with a browser, then `cordee pull FILE`.",
                "source",
            )
        rest = rest[2:]
    file = shown or "/".join(rest)
    if file and not file.lower().endswith(MODEL_SUFFIX):  # a tab of the repository's page, or a folder
        file = ""
    match = _HUB.fullmatch(f"{repository}/{file}" if file else repository)
    if match is None:
        raise _no_model(text)
    return HubModelName(match["repository"], match["quantization"], match["file"])


def _no_model(text: str) -> BadRequest:
    return BadRequest(
        f"{text} does not name a model of the hub: its page is {constants.ENDPOINT}/owner/name.", "source"
    )


def require_file(source: str) -> None:
    """Refuse a `source` that can only be meant as a file on this machine, which is not there.

    Raises:
        ModelNotFound: says what is there instead.
        BadModelFile: it is there, or may be, and cannot be read.
    """
    windows = _WINDOWS.match(source)
    if windows:
        drive, rest = windows["drive"], re.sub(r"^[A-Za-z]:", "", source).replace("\\", "/")
        place = f"/mnt/{drive.lower()}{rest}" if drive else rest
        raise ModelNotFound(
            f"{source} is a path as Windows writes it; here it would be {place}"
            f"{' (under WSL)' if drive else ''}: `cordee pull {shlex.quote(place)}`."
        )
    path = Path(expanded(source))
    if source.startswith(("/", ".", "~")) or (looks_like_file(source) and _is_here(path)):
        raise _no_file(path)
    if "/" not in source and os.path.isdir(path):  # noqa: PTH112 - Path's own raises for some names
        raise _no_file(path)


def _no_file(path: Path) -> CordeeError:
    """Why there is no model file at `path`, and what was perhaps meant."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_folder = False
    except OSError as error:
        return BadModelFile(f"{path} cannot be read ({error.strerror}): check its name and permissions.")
    if is_folder:
        near = _names_like(path / MODEL_SUFFIX)
        hint = f"name a file in it{', such as ' + near[0] if near else ''}."
        return ModelNotFound(f"{path} is a folder, and not that of a checkpoint (config.json): {hint}")
    if not os.path.isdir(path.parent):  # noqa: PTH112
        return ModelNotFound(f"There is no file {path}, and no folder {path.parent}: check the path.")
    near = _names_like(path)
    hint = f"did you mean {' or '.join(near)}?" if near else f"`ls {path.parent}` shows what is there."
    return ModelNotFound(f"There is no file {path}: {hint}")


def looks_like_file(source: str) -> bool:
    """Whether the name ends like that of a model file, or almost: .ggfu, .guff."""
    suffix = PurePosixPath(source).suffix.lower()
    return suffix == ".safetensors" or bool(get_close_matches(suffix, [MODEL_SUFFIX], cutoff=0.6))


def _is_here(path: Path) -> bool:
    """Whether its first folder is here (or it has none), so that a file is meant and not a repository."""
    return len(path.parts) == 1 or os.path.isdir(path.parts[0])  # noqa: PTH112 - as above


def _names_like(path: Path) -> list[str]:
    try:
        there = [entry.name for entry, _ in zip(path.parent.iterdir(), range(LOOKED_AT), strict=False)]
    except OSError:
        return []
    close = get_close_matches(path.name, there, n=3, cutoff=0.6)
    models = sorted(name for name in there if name.lower().endswith(MODEL_SUFFIX))
    chosen = close or (models if len(models) <= 3 else [])
    return [str(path.parent / name) for name in chosen]


def nothing_like(source: str, names: Collection[str]) -> ModelNotFound:
    """The error for a `source` that is none of all this; `names` are those of the model cards."""
    return ModelNotFound(
        f"{source!r} is not a file, a hub repository (owner/name) or a model card{nearest(source, names)}: "
        "`cordee models` lists the cards."
    )
