"""Signatures of the simulator's nodes: what a fault writes, or alters, does not carry one."""

import hashlib
import hmac
from collections.abc import Container
from dataclasses import dataclass

KEY = b"the simulator's: one for all nodes, as their names are in what they sign"


@dataclass(frozen=True)
class Seals:
    """A `cordee.cluster.trust.Trust`. `members` are the nodes that ever were members; None: any."""

    node: str
    members: Container[str] | None = None

    @property
    def member_certificate(self) -> bytes:
        """Its certificate."""
        return f"member {self.node}".encode()

    def sign_statement(self, statement: bytes) -> bytes:
        """Its signature."""
        return hmac.digest(KEY + self.node.encode(), statement, hashlib.sha256)

    def is_signed(self, node: str, certificate: bytes, statement: bytes, signature: bytes) -> bool:
        """Whether a member signed a statement."""
        other = Seals(node)
        is_member = self.members is None or node in self.members
        return (
            is_member
            and certificate == other.member_certificate
            and signature == other.sign_statement(statement)
        )
