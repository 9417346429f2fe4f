"""How a running member becomes an admin: an admin hands it the authority's key, `cordee admin add NODE`.

    admin                                              member, at its inbox
      |-- TLS 1.3, certificates on both sides ------------>|
      |   is it that very node, and not removed?           |   a member, and not removed?
      |-- Promotion: the authority's key, a nonce -------->|   is it this cluster's? then to the disk
      |<- Promoted: the nonce, signed with that key -------|
      |   does the signature fit? else it is no admin

The key travels inside TLS alone, to the node whose id is in the certificate that the handshake has verified;
never over the bus, which all members share. A recorded link holds nothing to read and nothing to repeat: its
keys are gone with it. Only an admin can send a Promotion that is accepted, since it holds the key itself.
"""

import asyncio
import contextlib
import logging
import secrets

from cordee.agent.exchange import exchange
from cordee.cluster.facts import Facts
from cordee.errors import BadRequest
from cordee.net.identity import Identity
from cordee.worker import frames
from cordee.worker.frames import LinkClosed
from cordee.worker.messages import Promoted, Promotion

NONCE_BYTES = 16
ANSWER_SECONDS = 20.0  # for the other side to write a file

log = logging.getLogger(__name__)


async def hand_over(identity: Identity, member: Facts) -> None:
    """Make an admin of a running member.

    Raises:
        BadRequest: it cannot be reached, or does not confirm; the message says what to do.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        promotion = Promotion(identity.authority_key_pem(), nonce)
        answer, _ = await exchange(identity.folder, member, promotion, ANSWER_SECONDS)
        if not isinstance(answer, Promoted) or not identity.is_admin_proof(member.node, nonce, answer.proof):
            raise LinkClosed("its answer proves nothing")
    except LinkClosed as error:
        raise BadRequest(
            f"{member.name} did not confirm that it is an admin now ({error}): look with `cordee nodes` "
            "whether it is, and whether it runs the same version; then try again.",
            "node",
        ) from error


async def accept(identity: Identity, promotion: Promotion, writer: asyncio.StreamWriter) -> bool:
    """Become an admin, and prove it to the sender; False if the promotion is worth nothing.

    Raises:
        StorageFailed: the key cannot be written.
    """
    try:
        identity.become_admin(promotion.authority_key)
    except (ValueError, TypeError):
        log.warning("a member sent a key that is not the authority's")
        return False
    frames.write(writer, Promoted(identity.prove_admin(promotion.nonce[:NONCE_BYTES])))
    writer.close()
    with contextlib.suppress(OSError):  # the sender went: it asks again
        await writer.wait_closed()
    return True
