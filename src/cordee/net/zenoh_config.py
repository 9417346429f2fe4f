"""How a zenoh session is set up for the bus: what it trusts, where it listens, what bounds it has.

The reasons are in zenoh_bus.py.
"""

import hashlib
import socket
from collections.abc import Iterable, Sequence
from typing import Any

from cordee.net.bus import REMOVED
from cordee.net.identity import Identity, slot_of, slots

LEASE_SECONDS = 3  # of silence until a link is given up
KEEP_ALIVES = 6  # in a lease: a busy machine may miss some
# First and longest pause before an address is tried again, also a further address of a node that is linked.
RETRY_SECONDS = (0.2, 4.0)
STALLED_SECONDS = 2.0  # a neighbour that takes no data for this long loses its link, and may connect again
# A heartbeat; a chunk of a slice takes 1 MB. zenoh holds up to sixteen of them, half received, for each link.
MESSAGE_BYTES_MAX = 4 << 20
LINKS_MAX = 512  # two for each of slots(), one from either side
# zenoh reads its links on two threads, unless the environment says otherwise before its first session. But a
# link whose node fell silent keeps one of them in the system's close() for 10 s (zenoh sets SO_LINGER), and
# a lost node had two links: nothing else would be read meanwhile. With this many threads 32 nodes may be lost
# at once; a thread costs 20 kB.
RUNTIME = ("ZENOH_RUNTIME", "(rx: (worker_threads: 64))")
PENDING_LINKS_MAX = 32  # whose handshake is under way
SCOUTING_GROUP = "224.0.0.224"  # link-local: no switch needs to be asked to forward it
SCOUTING_PORTS = (20_000, 10_000)  # the first, how many: below the ports that systems hand out
# What a member may do under every key of the cluster, and what only under its own.
ASKS = ("query", "declare_subscriber", "liveliness_query", "declare_liveliness_subscriber")
SAYS = ("put", "reply", "declare_queryable", "liveliness_token")


def session_config(
    identity: Identity, host: str, port: int, peers: list[tuple[str, int]], scouting: str
) -> dict[str, Any]:
    """zenoh's configuration for a member that listens on `host` (empty: all interfaces) and `port`.

    `peers`: (host, port) of nodes to look for; `scouting`: the interface for multicast, empty for none.
    """
    folder = identity.folder
    return {
        "mode": "peer",
        "listen": {"endpoints": [_locator(host, port)]},
        "connect": {
            "endpoints": [_locator(*each) for each in peers],
            "retry": {
                "period_init_ms": int(RETRY_SECONDS[0] * 1000),
                "period_max_ms": int(RETRY_SECONDS[1] * 1000),
            },
        },
        "open": {"return_conditions": {"connect_scouted": False, "declares": False}},
        "scouting": scouting_config(identity.cluster, scouting),
        "access_control": _access(identity.cluster, identity.revoked),
        "transport": {
            "shared_memory": {"enabled": False},  # it would lie in the clear in /dev/shm
            "unicast": {"accept_pending": PENDING_LINKS_MAX, "max_sessions": LINKS_MAX},
            "link": {
                "protocols": ["tls"],
                "tx": {
                    "lease": LEASE_SECONDS * 1000,
                    "keep_alive": KEEP_ALIVES,
                    "queue": {
                        "congestion_control": {
                            "block": {"wait_before_close": int(STALLED_SECONDS * 1_000_000)}
                        }
                    },
                },
                "rx": {"max_message_size": MESSAGE_BYTES_MAX + (64 << 10)},  # and its header
                "tls": {
                    "root_ca_certificate": str(folder / "ca.pem"),
                    "listen_certificate": str(folder / "node.pem"),
                    "listen_private_key": str(folder / "node.key"),
                    "connect_certificate": str(folder / "node.pem"),
                    "connect_private_key": str(folder / "node.key"),
                    "enable_mtls": True,
                    "verify_name_on_connect": False,
                    "close_link_on_expiration": True,
                },
            },
        },
    }


def scouting_config(cluster: str, interface: str) -> dict[str, Any]:
    """zenoh's configuration for finding the nodes of a cluster; `interface` as in BusOptions.scouting."""
    first, count = SCOUTING_PORTS
    port = first + int.from_bytes(hashlib.sha256(cluster.encode()).digest()[:4]) % count
    multicast: dict[str, Any] = {"enabled": bool(interface), "address": f"{SCOUTING_GROUP}:{port}"}
    if interface:
        multicast["interface"] = interface
    return {"delay": 0, "multicast": multicast, "gossip": {"enabled": True}}


def _access(cluster: str, revoked: Iterable[str]) -> dict[str, Any]:
    """Members hear all and say only what is theirs, a removed node sees that it was removed, others nothing.

    A subject is a session that shows one of the listed common names. A member's keys are those of which the
    chunk behind the kind, in `removed/...` the one behind the removed node, begins with its slot's digits:
    nobody says anything under another's key, neither by forging nor by playing back. No peer passes on what
    another said (zenoh does that only for clients, and then checks their names in the same way).
    """
    prefix = f"cordee/{cluster}/"
    access: dict[str, Any] = {
        "enabled": True,
        "default_permission": "deny",
        "rules": [
            _rule("hears", (*ASKS, *SAYS), ["egress"], "cordee/**"),
            _rule("asks", ASKS, ["ingress"], "cordee/**"),
        ],
        "subjects": [],
        "policies": [],
    }
    removed = {slot_of(node): node for node in sorted(revoked)}
    for slot in slots():
        if slot in removed:
            key = prefix + REMOVED.format(removed[slot], "*", "*")
            rules = [
                _rule(f"asks-{slot}", ["declare_liveliness_subscriber"], ["ingress"], key),
                _rule(f"hears-{slot}", ["liveliness_token"], ["egress"], key),
            ]
            names = [rule["id"] for rule in rules]
        else:
            own = slot.removeprefix(slot_of("")) + "$*"
            keys = (f"{prefix}*/{own}/**", prefix + REMOVED.format("*", own, "*"))
            rules = [_rule(f"says-{slot}", SAYS, ["ingress"], *keys)]
            names = ["hears", "asks", f"says-{slot}"]
        access["rules"] += rules
        access["subjects"].append({"id": slot, "cert_common_names": [slot]})
        access["policies"].append({"rules": names, "subjects": [slot]})
    return access


def _rule(name: str, messages: Sequence[str], flows: Sequence[str], *keys: str) -> dict[str, Any]:
    return {
        "id": name,
        "messages": list(messages),
        "flows": list(flows),
        "permission": "allow",
        "key_exprs": list(keys),
    }


def _locator(host: str, port: int) -> str:
    """zenoh's form of an address. It takes an IPv6 address in brackets for a host name, and fails.

    On all interfaces it listens with one socket of IPv6, where the system has that.
    """
    everywhere = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"
    return f"tls/{host or everywhere}:{port}"
