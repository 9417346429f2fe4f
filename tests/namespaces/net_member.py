"""A member on a host of the lab that somebody has taken over: `net_member.py FOLDER FILE LISTENER...`

FOLDER is the identity of a member, with its true certificate. It listens to everything on the bus of all
nodes (LISTENER is HOST:PORT) and answers every query that it can see with nothing, until standard input ends.
FILE gets each key and payload that it heard. Prints "ready" once it hears.
"""

import sys
from pathlib import Path

import zenoh

from intruders import intruder


def main() -> None:
    folder, file, *listeners = sys.argv[1:]
    with Path(file).open("wb", buffering=0) as heard:

        def note(sample: zenoh.Sample) -> None:
            heard.write(str(sample.key_expr).encode() + b" " + sample.payload.to_bytes() + b"\n")

        def asked(query: zenoh.Query) -> None:
            payload = b"" if query.payload is None else query.payload.to_bytes()
            heard.write(str(query.key_expr).encode() + b" " + payload + b"\n")

        with intruder(Path(folder), Path(folder) / "ca.pem", listeners, 0) as session:
            subscriber = session.declare_subscriber("cordee/**", note)
            queryable = session.declare_queryable("cordee/**", asked)
            print("ready", flush=True)
            sys.stdin.read()
            for each in (subscriber, queryable):
                each.undeclare()


main()
