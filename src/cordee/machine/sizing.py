"""The size of a service's stages: the answers at a time and the context that fit on the devices there are."""

from cordee.cluster.demand import SizeRequest, long_context, usual_context
from cordee.cluster.memory import BATCH_ROWS
from cordee.engine.llama import libllama
from cordee.engine.stage import StageConfig
from cordee.errors import BadRequest, DoesNotFit
from cordee.machine.memory import memory_for_stages
from cordee.models import fit
from cordee.models.gguf import Header

ACCELERATORS = ("GPU", "IGPU")  # kinds of devices that are used by default


def size_request(own: int | None, context: int | None, sequences: int | None, name: str) -> SizeRequest:
    """What is asked of a model called `name`, which was made for `own` tokens (None: it does not say).

    Raises:
        BadRequest: the context is longer than that.
    """
    if context is not None and own is not None and context > own:
        raise BadRequest(f"{name} was made for at most {own} tokens, not {context}.", "context")
    usual = usual_context(own, sequences)
    return SizeRequest(context, sequences, usual, longest=long_context(own))


def stage_config(
    header: Header,
    requested: SizeRequest,
    *,
    name: str,
    stages: int = 1,
    threads: int | None = None,
    devices: tuple[str, ...] = (),
    batch_invariant: bool = True,
    command: str = "",
) -> StageConfig:
    """The configuration of every stage of a model on this machine, with as much of `requested` as fits.

    No `devices` means every GPU that libllama can use, or else the CPU; `CPU` among them means the CPU alone.
    `name` is what people call the model; `command` is as for `fit.verdict`.

    Raises:
        DoesNotFit: it needs more memory than there is; says what would fit.
        BadRequest: a device is unknown, or no such cut exists.
        UnsupportedModel: the model cannot be cut.
    """
    chosen = chosen_devices(devices)
    found = fit.verdict(fit.stage_shapes(header, stages), requested, usable_memory(chosen), command)
    if not found.fits:
        raise DoesNotFit(f"{name} does not fit. {found.advice}")
    return StageConfig(
        context=found.demand.context,
        sequences=found.demand.sequences,
        batch_rows=max(BATCH_ROWS, found.demand.sequences),
        threads=threads,
        devices=tuple(device.name for device in chosen),
        batch_invariant=batch_invariant,
    )


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
    """Bytes that stages may take: of the devices' free memory, or of this machine's if there are none."""
    return sum(device.free_bytes for device in devices) if devices else memory_for_stages()
