"""Wrong keys, by the address that they come from: it has to wait before the next is looked at. Pure.

Nobody finds a key by trying, so this bounds what trying costs, and fills no log. Whoever shows a key that was
recognised before is not held up, whatever else comes from the same address, such as a proxy's.
"""

import ipaddress
from collections import OrderedDict

FREE = 10  # wrong keys of an address, such as a typing error in a program that tries again
PAUSE_SECONDS_MAX = 60.0  # doubled with each wrong key from one second on
FORGOTTEN_SECONDS = 600.0
ADDRESSES_MAX = 1024  # 100 kB; those that failed last
V6_NETWORK_BITS = 64  # of which a single machine has all addresses


class FailedKeys:
    """See the module's docstring. `now` is a clock that never jumps, in seconds."""

    def __init__(self) -> None:
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and when the last

    def pause_seconds(self, address: str, now: float) -> float:
        """How long an address has to wait before its next key is looked at; 0: not at all."""
        count, last = self._failed.get(_machine(address), (0, now))
        return max(0.0, last + _pause_seconds(count) - now)

    def note(self, address: str, now: float) -> None:
        """A wrong key came from an address."""
        machine = _machine(address)
        count, last = self._failed.pop(machine, (0, now))
        self._failed[machine] = (count + 1 if now - last < FORGOTTEN_SECONDS else 1), now
        while len(self._failed) > ADDRESSES_MAX:
            self._failed.popitem(last=False)

    def __len__(self) -> int:
        return len(self._failed)


def _pause_seconds(count: int) -> float:
    return 0.0 if count < FREE else min(PAUSE_SECONDS_MAX, 2.0 ** min(count - FREE, 10))


def _machine(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, V6_NETWORK_BITS), strict=False))
    return str(getattr(found, "ipv4_mapped", None) or found)
