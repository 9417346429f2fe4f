"""The clock of time-outs: it counts the seconds that this process was awake."""

# Ticks come far more often, even on a busy machine.
STEP_SECONDS_MAX = 1.0


class AwakeClock:
    """Seconds that this process was awake, as far as its ticks tell.

    After the process was stopped, or the clock was set, not everything must time out at once: messages that
    still wait to be read may prevent it. So a step between two ticks counts STEP_SECONDS_MAX at most.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last: float | None = None

    def tick(self, now: float) -> None:
        """Count the time since the last tick; `now` is the caller's clock, in seconds from any origin."""
        if self._last is not None:
            self.seconds += min(max(now - self._last, 0.0), STEP_SECONDS_MAX)
        self._last = now
