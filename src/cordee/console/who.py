"""Who may do what: reading wants any key, as everywhere; what changes something wants an admin."""

from urllib.parse import urlsplit

from starlette.requests import Request

from cordee.api import callers
from cordee.api.failures import AdminKeyNeeded, ForbiddenOrigin
from cordee.console.owner import is_owner

OWNER = "(this machine)"  # whoever runs the program, without a key


def is_admin(request: Request) -> bool:
    """Whether a request comes with an admin's key, or from the account that runs this program."""
    caller = callers.current()
    if caller.name:
        return caller.is_admin
    return is_owner(request.scope.get("client"), request.scope.get("server"))


def require_admin(request: Request) -> str:
    """The name of the admin who sent a request.

    Raises:
        AdminKeyNeeded: somebody else did.
    """
    caller = callers.current()
    if is_admin(request):
        return caller.name or OWNER
    if caller.name:
        raise AdminKeyNeeded(
            f"the key {caller.name} may ask the models and look around, and change nothing here: an admin's "
            "key may, which `cordee key add NAME --admin` makes"
        )
    raise AdminKeyNeeded(
        "another account of this machine runs Cordée: to change something here, come with an admin's key, "
        "which `cordee key add NAME --admin` makes"
    )


def require_own_page(request: Request) -> None:
    """Refuse what a page of another site, or of another program of this machine, has a browser send.

    A program that is no browser sends neither header. The body has to be declared as JSON besides, which no
    form of another site can do.

    Raises:
        ForbiddenOrigin: it is such a page.
    """
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    is_own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not is_own or site not in (None, "same-origin"):
        raise ForbiddenOrigin("only the pages of this server itself may do this")
