"""The size of a service's stages: the context that fits on the devices there are."""

from dataclasses import replace

from cordee.cluster.memory import BATCH_ROWS
from cordee.engine.llama import libllama
from cordee.engine.stage import StageConfig
from cordee.errors import BadRequest, DoesNotFit
from cordee.machine.memory import memory
from cordee.models import fit
from cordee.models.gguf import Header

# By default the KV cache has room for this many tokens in all: 0.75 GB for the starter model.
CELLS_DEFAULT = 32768
ACCELERATORS = ("GPU", "IGPU")  # kinds of devices that are used by default


def stage_config(
    header: Header,
    *,
    stages: int,
    sequences: int,
    context: int | None,
    threads: int | None = None,
    devices: tuple[str, ...] = (),
    batch_invariant: bool = True,
) -> StageConfig:
    """The configuration of every stage of a model on this machine.

    `context` None means the model's own, bounded by CELLS_DEFAULT and by memory. No `devices` means every GPU
    that libllama can use, or else the CPU; `CPU` among them means the CPU alone.

    Raises:
        DoesNotFit: the model, or the requested context, needs more memory than there is.
        BadRequest: a device is unknown, the context is longer than the model's own, or no such cut exists.
        UnsupportedModel: the model cannot be cut.
    """
    own = fit.own_context(header)
    if context is not None and own is not None and context > own:
        raise BadRequest(f"{header.name} was made for at most {own} tokens, not {context}", "context")
    chosen = chosen_devices(devices)
    config = StageConfig(
        context=context or max(1, CELLS_DEFAULT // sequences),
        sequences=sequences,
        batch_rows=max(BATCH_ROWS, sequences),
        threads=threads,
        devices=tuple(device.name for device in chosen),
        batch_invariant=batch_invariant,
    )
    have_bytes = usable_memory(chosen)
    if context is None:
        return _sized(header, config, have_bytes, stages)
    found = fit.verdict(header, config, have_bytes, stages)
    if not found.fits:
        raise DoesNotFit(f"{header.name} does not fit. {found.advice}")
    return config


def chosen_devices(names: tuple[str, ...]) -> list[libllama.LlamaDevice]:
    """The devices of these names, without the CPU; with no names, every GPU.

    Raises:
        BadRequest: libllama has no device of that name.
    """
    known = {device.name: device for device in libllama.devices()}
    for name in names:
        if name not in known:
            raise BadRequest(
                f"there is no device {name} here; this libllama has {', '.join(known)}", "device"
            )
    if "CPU" in names:
        return []
    return [known[name] for name in names or known if known[name].kind in ACCELERATORS]


def usable_memory(devices: list[libllama.LlamaDevice]) -> int:
    """Bytes that stages may take: the devices' free memory, or this machine's if there are none."""
    return sum(device.free_bytes for device in devices) if devices else memory().available_bytes


def _sized(header: Header, config: StageConfig, have_bytes: int, stages: int) -> StageConfig:
    context = fit.sized_context(
        header,
        have_bytes,
        sequences=config.sequences,
        batch_rows=config.batch_rows,
        limit=config.context,
        stages=stages,
    )
    return replace(config, context=context)
