"""Intruders on a host of the lab, none a member: `net_intruder.py AUTHORITY CLUSTER FOLDER,... LISTENER...`

Each FOLDER holds a node.pem and node.key, AUTHORITY is the certificate that signs the cluster's, a LISTENER
is HOST:PORT. The intruders listen on the bus of every node, publish on it, and connect to every listener; so
does one without a certificate. Prints, by the folder's name (or "none"), what each of them learned:
{"heard": keys, "replies": count, "said": what each listener sent}.
"""

import contextlib
import json
import socket
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import zenoh

from intruders import intruder

BUS_PORT = "7330"
LISTEN_SECONDS = 8.0  # heartbeats of every node, even on a machine that is busy with other tests
CONNECT_SECONDS = 0.5
BYTES_MAX = 4096
THREADS = 16  # listeners that are connected to at the same time


def main() -> None:
    authority, cluster, folders, *listeners = sys.argv[1:]
    buses = [listener for listener in listeners if listener.endswith(f":{BUS_PORT}")]
    forged = f"cordee/{cluster}/heartbeat/forged"
    intruders = {_name(folder): folder for folder in map(Path, folders.split(","))}
    with contextlib.ExitStack() as stack:
        heard: dict[str, list[str]] = {}
        sessions = {}
        for name, folder in intruders.items():
            sessions[name] = intruder(folder, Path(authority), buses, 0)
            stack.callback(sessions[name].close)
            heard[name] = listen(sessions[name])
        said = {name: hear_all(listeners, folder) for name, folder in {**intruders, "none": None}.items()}
        for _ in range(10):
            time.sleep(LISTEN_SECONDS / 10)
            for session in sessions.values():
                session.put(forged, b"forged")
        replies = {
            # An error is the session's own: that the time was up.
            name: sum(reply.ok is not None for reply in session.get("cordee/**", timeout=CONNECT_SECONDS))
            for name, session in sessions.items()
        }
    learned = {
        name: {
            "heard": [key for key in heard.get(name, []) if key != forged],
            "replies": replies.get(name, 0),
            "said": said[name],
        }
        for name in said
    }
    print(json.dumps(learned))


def _name(folder: Path) -> str:
    return folder.parent.name if folder.name == "cluster" else folder.name


def listen(session: zenoh.Session) -> list[str]:
    """The keys of all that is heard from now on."""
    keys: list[str] = []

    def note(sample: zenoh.Sample) -> None:
        keys.append(str(sample.key_expr))

    session.declare_subscriber("cordee/**", note)
    session.liveliness().declare_subscriber("cordee/**", note, history=True)
    return keys


def hear_all(listeners: list[str], folder: Path | None) -> dict[str, str]:
    """`hear` of all listeners, by listener."""
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(listeners, pool.map(lambda listener: hear(folder, listener), listeners), strict=True))


def hear(folder: Path | None, listener: str) -> str:
    """What a listener sends inside TLS to a client with the certificate of this folder, in hexadecimal."""
    host, _, port = listener.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if folder is not None:
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
    said = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host, int(port)), CONNECT_SECONDS) as plain,
        context.wrap_socket(plain) as link,
    ):
        link.settimeout(CONNECT_SECONDS)
        while data := link.recv(BYTES_MAX):
            said += data
    return said.hex()


main()
