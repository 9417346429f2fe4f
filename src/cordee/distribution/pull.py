"""Putting models into the store: from a file, from the hub, or by the name of a model card.

Ternary models of any format are stored as files for the ternary engine (convert.py).
"""

import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from gguf import GGMLQuantizationType

from cordee.convert.checkpoint import is_ternary
from cordee.convert.convert import convert
from cordee.convert.safetensors import INDEX, read_json
from cordee.distribution.hub import HubFile, downloaded, repository_files
from cordee.distribution.source import (
    HubModelName,
    hub_model_name,
    looks_like_file,
    nothing_like,
    require_file,
)
from cordee.errors import BadRequest, ModelNotFound, UnsupportedModel
from cordee.files import expanded
from cordee.models.cards import cards
from cordee.models.gguf import BLOCK, BitnetType, BlockType, engine_of, read_header
from cordee.models.slices import Progress
from cordee.models.store import QUOTED_NAME_BYTES, Store, StoredModel, check_name

# The default choice, best first: a good trade of size and quality that also runs fast on a CPU.
PREFERENCE = ("Q4_K_M", "MXFP4", "MXFP4_MOE", "Q4_0", "Q4_K_S", "Q5_K_M", "Q8_0", "F16", "BF16")

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANTIZATION = re.compile(
    r"(?<![a-z0-9])((?:ud-)?(?:[ip]?q\d\w*|p?tq\d_\d|i2_s|mxfp4(?:_moe)?|bf16|f16|f32))(?![a-z0-9])",
    re.IGNORECASE,
)
# A vision encoder, which is no language model.
_VISION = "mmproj"
# A quantizer's statistics. It also marks models that were quantized by them: `m-Q4_K_M-imatrix.gguf`.
# Weights of full precision never are, so the `f16` of `m-f16-imatrix.gguf` says what the statistics are of.
_STATISTICS = "imatrix"
_FULL_PRECISION = ("", "F16", "BF16", "F32")
# The files of a checkpoint beside its weights; the first must be there.
CHECKPOINT_FILES = (
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("generation_config.json", "added_tokens.json", "chat_template.jinja", INDEX),
)
TERNARY_TYPES = {GGMLQuantizationType.TQ1_0, GGMLQuantizationType.TQ2_0, *BitnetType, *BlockType}

Report = Callable[[str], None]


def pull(
    source: str,
    name: str | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
    pre: str | None = None,
) -> StoredModel:
    """Put a model into the store under `name`, by default under its card's, repository's or file's name.

    `source` is a model card's name; a path to a GGUF file (the first of a set), or to the folder of a ternary
    checkpoint; or `owner/name`, `owner/name:QUANTIZATION` or `owner/name/file.gguf` on the hub, or the
    address of such a page or file there. Only those of the hub use the network: `report` then says what is
    fetched from where. It also says when a model is converted; `pre` is as for `convert`.
    `progress(done_bytes, total_bytes)`.

    Raises:
        ModelNotFound: nothing of that name, here or on the hub.
        BadRequest: the repository has several models and `source` does not say which; `name` is invalid.
        SetupNeeded: the proxy, the certificates or the token of this machine cannot be used.
        BadModelFile: what was given or fetched is not a model.
        UnsupportedModel: a checkpoint is not ternary.
        StorageFailed: no room on the disk, no connection to the hub, or it sent other content than promised.
    """
    puller = _Puller(store or Store(), progress, report or _ignore, pre)
    if name:
        check_name(name)
    card = cards().get(source)
    if card:
        if card.path is not None:
            return puller.store.add_file(card.path, name or card.name, progress, take="link")
        return puller.from_hub(card.source, name or card.name)
    path = Path(expanded(source))
    if _is_model(path):
        return puller.from_disk(path, name)
    require_file(source)
    if not is_on_hub(source):
        raise nothing_like(source, cards())
    try:
        return puller.from_hub(source, name or hub_name(source))
    except ModelNotFound as error:
        if source.count("/") > 1 or not looks_like_file(source):
            raise
        raise ModelNotFound(f"{error.message} Nor is there a file {path.absolute()}.") from error


def _is_model(path: Path) -> bool:
    """Whether there is a file, or the folder of a checkpoint."""
    try:
        return path.is_file() or (path / CHECKPOINT_FILES[0]).is_file()
    except (OSError, ValueError):  # no name of a file at all: too long, or with a null character
        return False


def is_on_hub(source: str) -> bool:
    """Whether `source` names a model on the hub ('owner/name…' or an address), which a card's name does not.

    Raises:
        BadRequest: an address of something else.
    """
    return hub_model_name(source) is not None


def hub_name(source: str) -> str:
    """The default name of a model on the hub ('owner/name…' or an address).

    Raises:
        BadRequest: `source` does not name one.
    """
    asked = _asked(source)
    name = _plain(re.sub(r"-gguf$", "", asked.repository.partition("/")[2], flags=re.IGNORECASE))
    return f"{name}:{asked.quantization}" if asked.quantization else name


def hub_files(source: str) -> list[HubFile]:
    """The files of one model on the hub, all shards in order; `source` as `pull` takes it, or a card's name.

    Raises:
        BadRequest: the repository has several models and `source` does not say which, or this is no source.
        ModelNotFound: the repository has no GGUF model, or there is no such repository.
        StorageFailed: as `pull` does.
    """
    card = cards().get(source)
    asked = _asked(card.source if card else source)
    files = repository_files(asked.repository)
    if not _models(files):
        raise ModelNotFound(
            f"{asked.repository} on the hub holds no GGUF model: look for its GGUF edition. If it is a "
            f"ternary checkpoint, `cordee pull {asked.repository}` makes a file of it on one of the nodes, "
            "which can then be deployed."
        )
    return _choose(asked, files)


def _asked(source: str) -> HubModelName:
    asked = hub_model_name(source)
    if asked is None:
        raise BadRequest(f"{source!r} is not a model of a hub repository (owner/name).", "source")
    return asked


def _ignore(_: str) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class _Puller:
    """Puts models into a store; `pre` is the pre-tokenizer of a checkpoint."""

    store: Store
    progress: Progress | None
    report: Report
    pre: str | None

    def from_disk(self, path: Path, name: str | None) -> StoredModel:
        """A GGUF file, or a checkpoint's folder."""
        place = path.resolve()
        if path.is_dir():
            return self._converted(place, name or _plain(place.name), str(place), place.name)
        name = name or _plain(_SHARD.sub("", path.stem))
        if _has_type(path, TERNARY_TYPES):
            return self._converted(path, name, str(place))
        return self.store.add_file(path, name, self.progress)

    def from_hub(self, source: str, name: str) -> StoredModel:
        """The model of a repository that `source` names: a GGUF, or if there is none a checkpoint."""
        asked = _asked(source)
        repository = asked.repository
        files = repository_files(repository)
        is_open = not (_models(files) or asked.quantization or asked.file)
        checkpoint = self._checkpoint(files) if is_open else []
        chosen = checkpoint or _choose(asked, files)
        self._tell(chosen)
        with downloaded(chosen, self.progress) as paths:
            if checkpoint:
                return self._converted(paths[0].parent, name, repository, repository.partition("/")[2])
            place = f"{repository}/{chosen[0].path}"
            if _has_type(paths[0], TERNARY_TYPES):
                return self._converted(paths[0], name, place)
            digest = f"sha256:{chosen[0].sha256}" if len(chosen) == 1 else None
            return self.store.add_file(paths[0], name, source=place, digest=digest, take="move")

    def _converted(self, path: Path, name: str, source: str, title: str | None = None) -> StoredModel:
        """A ternary model as a file for the ternary engine. What only libllama runs stays as it is."""
        self.report(f"Converting {title or path.name} for the ternary engine; no weight is changed")
        with self.store.working_folder() as folder:
            ready = folder / "converted.gguf"
            try:
                convert(path, ready, pre=self.pre, title=title, progress=self.progress)
            except UnsupportedModel as error:
                if path.is_dir() or not _runs_as_it_is(path):
                    raise
                self.report(f"It stays as it is: {error.message}")
                return self.store.add_file(path, name, self.progress, source=source)
            return self.store.add_file(ready, name, self.progress, source=source, take="move")

    def _checkpoint(self, files: list[HubFile]) -> list[HubFile]:
        """The files of a repository's checkpoint, if its config.json says that it is ternary; or none."""
        found = {file.path: file for file in files if file.path in CHECKPOINT_FILES}
        weights = [file for file in files if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file.path)]
        whole = [file for file in files if file.path == "model.safetensors"]
        if CHECKPOINT_FILES[0] not in found or not (whole or weights):
            return []
        config = found[CHECKPOINT_FILES[0]]
        self._tell([config])
        with downloaded([config]) as [path]:
            if not is_ternary(read_json(path), config.repository):
                return []
        return [*found.values(), *(whole or weights)]

    def _tell(self, chosen: list[HubFile]) -> None:
        """Report what is fetched: everything that uses the network is reported."""
        largest = max(chosen, key=lambda file: file.nbytes)
        size = sum(file.nbytes for file in chosen) / 1e9
        self.report(f"Fetching {largest.path} ({size:.1f} GB) from the hub repository {largest.repository}")


def _runs_as_it_is(path: Path) -> bool:
    """Whether an engine takes a GGUF file that was not converted."""
    try:
        engine_of(read_header(path))
    except UnsupportedModel:
        return False
    return True


def _has_type(path: Path, types: Container[int]) -> bool:
    """Whether a layer's tensor in a GGUF file is of one of these types."""
    return any(tensor.type in types for tensor in read_header(path).tensors if BLOCK.match(tensor.name))


def _choose(asked: HubModelName, files: list[HubFile]) -> list[HubFile]:
    """The files of one model of a repository: one, or all shards in order."""
    repository, models = asked.repository, _models(files)
    if asked.file:
        wanted = [m for m in models.values() if any(shard.path == asked.file for shard in m)]
    elif asked.quantization:
        label = asked.quantization.upper()
        wanted = [
            m for stem, m in models.items() if label in (_label(stem), _label(stem).removeprefix("UD-"))
        ]
    else:
        wanted = list(models.values()) if len(models) == 1 else []
        for label in PREFERENCE:
            wanted = wanted or [m for stem, m in models.items() if _label(stem) == label]
    if len(wanted) == 1:
        return wanted[0]
    if asked.file and any(file.path == asked.file and _other_kind(file.path) for file in files):
        raise BadRequest(
            f"{asked.file} of {repository} is {_other_kind(asked.file)}, not a language model.", "source"
        )
    if not models:
        raise ModelNotFound(
            f"{repository} on the hub holds no GGUF model, and no checkpoint whose config.json says that "
            "it is ternary: look for its GGUF edition."
        )
    labels = [_label(stem) for stem in models]
    known = labels if all(labels) and len(set(labels)) == len(labels) and not asked.file else None
    choices = [f":{label}" for label in known] if known else [f"/{m[0].path}" for m in models.values()]
    is_open = not (asked.file or asked.quantization)
    fault = "has several models" if wanted or is_open else "has no such model"
    raise BadRequest(
        f"{repository} on the hub {fault}: say which, as in {repository}{choices[0]}. "
        f"It has {', '.join(choices)}.",
        "source",
    )


def _models(files: list[HubFile]) -> dict[str, list[HubFile]]:
    """Complete models: path without suffix and shard number -> the model's files in order."""
    models: dict[str, list[HubFile]] = {}
    of_models = (file for file in files if file.sha256 and file.path.lower().endswith(".gguf"))
    for file in sorted(of_models, key=lambda file: file.path):
        stem = str(PurePosixPath(file.path).with_suffix(""))
        if not _other_kind(file.path):
            models.setdefault(_SHARD.sub("", stem), []).append(file)
    return {stem: shards for stem, shards in models.items() if len(shards) == _shard_count(shards[0])}


def _shard_count(first: HubFile) -> int:
    match = _SHARD.search(PurePosixPath(first.path).stem)
    return int(match[2]) if match else 1


def _other_kind(path: str) -> str:
    """What a GGUF file is that is no language model, by its name; empty if it seems to be one."""
    name = PurePosixPath(path).stem
    if _VISION in name.lower():
        return "a vision encoder"
    is_statistics = _STATISTICS in name.lower() and _quantization(name) in _FULL_PRECISION
    return "a quantizer's statistics" if is_statistics else ""


def _label(stem: str) -> str:
    """The quantization in a file's name, or else in its folder's, in capitals; empty if there is none."""
    path = PurePosixPath(stem)
    return _quantization(path.name) or _quantization(path.parent.name)


def _quantization(name: str) -> str:
    found = _QUANTIZATION.findall(name)
    return found[-1].upper() if found else ""


def _plain(text: str) -> str:
    """A name for a model, made from that of a file or a repository."""
    name = re.sub(r"[^\w.+-]+", "-", text).strip("-.")
    while len(quote(name, safe="")) > QUOTED_NAME_BYTES:
        name = name[:-1].rstrip("-.")
    return name or "model"
