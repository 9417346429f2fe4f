"""What the API asks of a model that is being served, wherever its stages run.

`LocalService` (workers of this machine) and `ClusterService` (any machines of the cluster) implement it; the
rooms that serve clients know no more of either.
"""

from collections.abc import AsyncGenerator
from typing import Literal, Protocol

from cordee.engine.vocabulary import Vocabulary
from cordee.generation.request import Request, TextChunk
from cordee.generation.template import ChatTemplate
from cordee.models.store import StoredModel

# ready: a request is worked on at once. recovering: it waits until stages are loaded or replaced. idle: no
# machine runs the model, and the first request makes the cluster deploy it.
Health = Literal["ready", "recovering", "idle"]


class Generator(Protocol):
    """What makes answers."""

    def generate(self, request: Request) -> AsyncGenerator[TextChunk]:
        """Answer a request: chunks as they come, the last with a finish reason.

        Closing the generator cancels the stream.

        Raises:
            BadRequest, ContextExceeded, Overloaded: before the first chunk.
            StageFailed: no stages can answer, or this request keeps breaking them.
        """
        ...


class ModelService(Generator, Protocol):
    """A model being served. All methods are called on the event loop that made it."""

    @property
    def name(self) -> str:
        """What requests call the model."""
        ...

    @property
    def model(self) -> StoredModel:
        """The file behind it, and when it was added."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """Its tokens, usable until the service is closed."""
        ...

    @property
    def template(self) -> ChatTemplate | None:
        """Its chat template; None for a base model."""
        ...

    @property
    def context(self) -> int:
        """Tokens of each stream, answer included."""
        ...

    @property
    def health(self) -> Health:
        """Whether a request would be worked on now."""
        ...
