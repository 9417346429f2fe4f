"""How a zenoh session is set up for the bus: what it trusts, where it listens, what bounds it has.

The reasons are in zenoh_bus.py.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from cordee.net.bus import REMOVED
from cordee.net.identity import Identity, slot_of, slots

LEASE_SECONDS = 3  # of silence until a link is given up
KEEP_ALIVES = 6  # in a lease: a busy machine may miss some
# First and longest pause before an address is tried again, also a further address of a node that is linked.
RETRY_SECONDS = (0.2, 4.0)
STALLED_SECONDS = 2.0  # a neighbour that takes no data for this long loses its link, and may connect again
MESSAGE_BYTES_MAX = 32 << 20  # a chunk of a slice and its header; token logs take far less
LINKS_MAX = 512  # two for each of slots(), one from either side
# zenoh reads its links on two threads, unless the environment says otherwise before its first session. But a
# link whose node fell silent keeps one of them in the system's close() for 10 s (zenoh sets SO_LINGER), and
# a lost node had two links: nothing else would be read meanwhile. With this many threads 32 nodes may be lost
# at once; a thread costs 20 kB.
RUNTIME = ("ZENOH_RUNTIME", "(rx: (worker_threads: 64))")
PENDING_LINKS_MAX = 32  # whose handshake is under way
SCOUTING_GROUP = "224.0.0.224"  # link-local: no switch needs to be asked to forward it
SCOUTING_PORTS = (20_000, 10_000)  # the first, how many: below the ports that systems hand out
MESSAGES = (
    "put",
    "query",
    "reply",
    "declare_subscriber",
    "declare_queryable",
    "liveliness_token",
    "liveliness_query",
    "declare_liveliness_subscriber",
)


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
        "access_control": _access(identity.revoked),
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


def _access(revoked: Iterable[str]) -> dict[str, Any]:
    """Members may send and receive everything, a removed node may see that it was removed, others nothing.

    A subject is a session that shows one of the listed common names.
    """
    removed = {slot_of(node): node for node in sorted(revoked)}
    members = [slot for slot in slots() if slot not in removed]
    access: dict[str, Any] = {
        "enabled": True,
        "default_permission": "deny",
        "rules": [_rule("everything", MESSAGES, ["ingress", "egress"], "cordee/**")],
        "subjects": [{"id": "members", "cert_common_names": members}],
        "policies": [{"rules": ["everything"], "subjects": ["members"]}],
    }
    for slot, node in removed.items():
        key = f"cordee/*/{REMOVED.format(node, '*')}"
        asks = _rule(f"asks-{node}", ["declare_liveliness_subscriber"], ["ingress"], key)
        hears = _rule(f"hears-{node}", ["liveliness_token"], ["egress"], key)
        access["rules"] += [asks, hears]
        access["subjects"].append({"id": node, "cert_common_names": [slot]})
        access["policies"].append({"rules": [asks["id"], hears["id"]], "subjects": [node]})
    return access


def _rule(name: str, messages: Sequence[str], flows: Sequence[str], key: str) -> dict[str, Any]:
    return {
        "id": name,
        "messages": list(messages),
        "flows": list(flows),
        "permission": "allow",
        "key_exprs": [key],
    }


def _locator(host: str, port: int) -> str:
    """zenoh's form of an address. It takes an IPv6 address in brackets for a host name, and fails."""
    return f"tls/{host or '[::]'}:{port}"
