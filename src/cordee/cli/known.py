"""What the cluster of the node that runs here knows of models, and the error for a name that nobody knows."""

from typing import TYPE_CHECKING, Any

from cordee.errors import ModelNotFound, NotRunning, nearest

if TYPE_CHECKING:
    from cordee.models.store import Store, StoredModel


def cluster_models() -> dict[str, dict[str, Any]] | None:
    """The cluster's models by name, as `cordee status --json` has them; None if no node runs here."""
    from cordee.agent import control

    try:
        return {
            model["name"]: model for model in control.ask("GET", "/status", kind=dict[str, Any])["models"]
        }
    except NotRunning:
        return None


def find(store: "Store", name: str) -> "StoredModel":
    """The model of that name. One that comes with the program is put into the store at its first use.

    Raises:
        ModelNotFound: no such model; the message says what to do.
    """
    try:
        return store.get(name)
    except ModelNotFound:
        found = _put(store, name)
        if found is None:
            raise unknown(store, name) from None
        return found


def put_if_here(name: str) -> bool:
    """Put a model that comes with the program into the store; False if none of that name does."""
    from cordee.models.store import Store

    return _put(Store(), name) is not None


def _put(store: "Store", name: str) -> "StoredModel | None":
    from cordee.distribution.pull import pull as fetch
    from cordee.models.cards import cards
    from cordee.terminal import output

    card = cards().get(name)
    if card is None or card.path is None:
        return None
    with output.progress(f"putting {name} into the store") as progress:
        return fetch(name, store=store, progress=progress)


def unknown(store: "Store", name: str) -> ModelNotFound:
    """The error for a model that is not in the store: where it is instead, or which names are like it."""
    from cordee.models.cards import cards

    others = cluster_models() or {}
    if name in others:
        return ModelNotFound(
            f"The model {name!r} is not on this machine, but {where(others[name])}: `cordee run {name}` asks "
            f"the cluster, `cordee plan {name}` says where it would run."
        )
    if name in cards():
        return ModelNotFound(f"The model {name!r} is not here yet: `cordee pull {name}` fetches it.")
    here = store.list(lambda _: None)  # damaged entries are not the question
    names = [*others, *cards(), *(model.name for model in here)]
    return ModelNotFound(
        f"There is no model {name!r}{nearest(name, names)}: `cordee ls` lists the models here, "
        "`cordee models` those that `cordee pull` fetches by name."
    )


def where(model: dict[str, Any]) -> str:
    """Where in the cluster a model is: `pc-2 has it`."""
    holders = model["offered_by"]
    if not holders:
        return "the cluster serves it in slices"
    return f"{' and '.join(holders)} {'has' if len(holders) == 1 else 'have'} it"


def facts_of_file(model: "StoredModel") -> dict[str, Any]:
    """A model of the store, as values for JSON."""
    return {
        "name": model.name,
        "digest": model.digest,
        "path": str(model.path),
        "bytes": model.nbytes,
        "source": model.source,
        "added": model.added,
    }
