"""Where the whole copies of a model are, by what `ClusterStatus.status` says of the cluster's models."""

from collections.abc import Mapping
from typing import Any


def is_elsewhere(name: str, models: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether another node than this has the whole model, under any name; `models` are by name."""
    digest = models[name]["digest"] if name in models else None
    alike = [model for other, model in models.items() if other == name or model["digest"] == digest]
    return any(len(model["offered_by"]) > model["offered_here"] for model in alike)
