"""Who signs, and whose signatures count, as the controller needs it. Pure: net/identity.py has the keys.

A deployment travels in everybody's heartbeats, so the link that brings it does not say who wrote it; its
author's signature does. With it comes the author's certificate, which shows that the author is, or once was,
a member. The certificate's dates do not matter: a deployment lasts longer, and clocks are wrong.
"""

from typing import Protocol


class Trust(Protocol):
    """A node's own key, and what it takes to check those of others."""

    @property
    def node(self) -> str:
        """The id of the node that signs here."""
        ...

    @property
    def member_certificate(self) -> bytes:
        """What shows others that this node is a member."""
        ...

    def sign_statement(self, statement: bytes) -> bytes:
        """This node's signature."""
        ...

    def is_signed(self, node: str, certificate: bytes, statement: bytes, signature: bytes) -> bool:
        """Whether the certificate is a member's of that id, and the signature is that member's."""
        ...
