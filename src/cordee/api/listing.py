"""Models as clients see them in lists: OpenAI's fields, and what other servers tell beside."""

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from cordee.chat.families import thinking_of
from cordee.models.store import StoredModel
from cordee.serving.interface import ModelService


def listed(
    services: Mapping[str, ModelService],
    embedding: Collection[StoredModel],
    expected: Collection[str],
    now: datetime,
) -> list[Any]:
    """All models by name: those that are served, those that give vectors, and those of `expected` that are
    still to come."""
    coming = {name: coming_model(name, now) for name in expected}
    ready = {name: described(name, service) for name, service in services.items()}
    vectors = {model.name: embedding_model(model) for model in embedding}
    return [model for _, model in sorted((coming | vectors | ready).items())]


def coming_model(name: str, now: datetime) -> dict[str, Any]:
    """A model that is being loaded: no more is known of it than its name."""
    return _model(name, now) | {"state": "loading"}


def described(name: str, service: ModelService) -> dict[str, Any]:
    """A model that is served: its state, its context in tokens by the names that clients know, its size in
    bytes, and what it can do."""
    model = service.model
    return _model(name, datetime.fromisoformat(model.added)) | {
        "state": service.health,
        "context_length": service.context,
        "max_model_len": service.context,
        "size": model.nbytes,
        "architecture": model.architecture,
        "capabilities": capabilities(service),
    }


def embedding_model(model: StoredModel) -> dict[str, Any]:
    """A model of this machine that gives vectors, or ranks, and does nothing else."""
    return _model(model.name, datetime.fromisoformat(model.added)) | {
        "state": "ready",
        "size": model.nbytes,
        "architecture": model.architecture,
        "capabilities": ["embedding"],
    }


def capabilities(service: ModelService) -> list[str]:
    """What can be asked of a model, in Ollama's words."""
    found = ["completion"]
    if service.vocabulary.infill is not None:
        found.append("insert")
    if service.template is not None:
        found.append("tools")
        if thinking_of(service.template.source) is not None:
            found.append("thinking")
    return found


def _model(name: str, created: datetime) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created.timestamp()), "owned_by": "cordee"}


def states(services: Mapping[str, ModelService], expected: Collection[str]) -> dict[str, str]:
    """The state of each model."""
    return dict.fromkeys(expected, "loading") | {name: each.health for name, each in services.items()}
