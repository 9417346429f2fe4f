"""What becomes of a call in a thread with a small stack, where calls that go too deep end the process."""

import threading
from collections.abc import Callable

from cordee.errors import BadRequest


def outcome(call: Callable[[], object], stack_bytes: int) -> str:
    """Why it is refused, or "taken"."""
    outcomes: list[str] = []

    def run() -> None:
        try:
            call()
            outcomes.append("taken")
        except BadRequest as error:
            outcomes.append(error.message)

    usual = threading.stack_size(stack_bytes)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(usual)
    (found,) = outcomes
    return found
