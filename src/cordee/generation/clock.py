"""Time for whoever waits: the seconds that this process was awake."""

# Ticks come many times as often, even on a busy machine.
STEP_SECONDS_MAX = 1.0


class AwakeClock:
    """Seconds that this process was awake, as far as its ticks tell.

    A process that was stopped, or a clock that was set, must not make everything late at once: messages that
    wait to be read may say otherwise. So a step between two ticks counts STEP_SECONDS_MAX at most.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last: float | None = None

    def tick(self, now: float) -> None:
        """`now` is what the shell's clock shows, in seconds from any beginning."""
        if self._last is not None:
            self.seconds += min(max(now - self._last, 0.0), STEP_SECONDS_MAX)
        self._last = now
