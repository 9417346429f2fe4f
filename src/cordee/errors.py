"""Every error that a user can meet: what is wrong, the remedy, and how a shell or an HTTP client sees it.

Raise one of these with a sentence that names the thing and says what to do. The command line prints
the sentence and exits with `exit_code`; the API answers `http_status` with `code` in the error body.
Any other exception that escapes is a bug and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches

NEAREST_MAX, NEAREST_CUTOFF = 3, 0.6  # how many names are suggested, and how alike they must be


def nearest(name: str, names: Iterable[str]) -> str:
    """What to put behind a name that does not exist: ` (did you mean a or b?)`, if any is like it."""
    close = get_close_matches(name, sorted(set(names)), n=NEAREST_MAX, cutoff=NEAREST_CUTOFF)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


class CordeeError(Exception):
    """Base of all expected errors."""

    exit_code = 1
    http_status = 500
    code = "internal_error"

    @property
    def message(self) -> str:
        return str(self)


class BadRequest(CordeeError):
    """The request or the command line asks for something that cannot be done; `param` names it."""

    exit_code = 2
    http_status = 400
    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextExceeded(BadRequest):
    """The prompt does not fit the context."""

    code = "context_length_exceeded"


class ModelNotFound(CordeeError):
    """There is no model of that name."""

    exit_code = 3
    http_status = 404
    code = "model_not_found"


class BadModelFile(CordeeError):
    """A model file is damaged, is not GGUF, or states wrong sizes."""

    exit_code = 4
    http_status = 422
    code = "bad_model_file"


class UnsupportedModel(CordeeError):
    """A valid model file that this program (or this operation) does not support."""

    exit_code = 5
    http_status = 422
    code = "unsupported_model"


class DoesNotFit(CordeeError):
    """The model needs more memory than this machine, or the cluster, has."""

    exit_code = 6
    http_status = 507
    code = "does_not_fit"


class StorageFailed(CordeeError):
    """The disk is full, or a file could not be written or fetched; nothing half-written is left."""

    exit_code = 7
    http_status = 507
    code = "storage_failed"


class HubUnreachable(StorageFailed):
    """The model hub cannot be reached, or the connection broke."""

    code = "hub_unreachable"


class StageFailed(CordeeError):
    """A stage could not be loaded, or keeps failing after being replaced."""

    exit_code = 8
    http_status = 503
    code = "stage_failed"


class Overloaded(CordeeError):
    """The request queue is full; try again later."""

    exit_code = 9
    http_status = 503
    code = "overloaded"


class SetupNeeded(CordeeError):
    """Something that this machine needs is missing or set wrongly; the message has the remedy."""

    exit_code = 10
    http_status = 503
    code = "setup_needed"


class IdentityDamaged(CordeeError):
    """A file of this node's cluster identity is missing or damaged."""

    exit_code = 11
    http_status = 503
    code = "identity_damaged"


class JoinFailed(CordeeError):
    """This machine was not let into the cluster: the code, the address or the clock is wrong."""

    exit_code = 12
    http_status = 403
    code = "join_failed"


class NotRunning(CordeeError):
    """No node runs here for this state folder; `cordee up` starts one."""

    exit_code = 13
    http_status = 503
    code = "not_running"


class KeyNeeded(CordeeError):
    """The API's key is missing, or is another one; the message says where it is."""

    exit_code = 14
    http_status = 401
    code = "invalid_api_key"


class RateLimited(CordeeError):
    """The key has used what it may for now; `Retry-After` says when to come again."""

    exit_code = 9
    http_status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, wait_seconds: float = 1.0) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds
