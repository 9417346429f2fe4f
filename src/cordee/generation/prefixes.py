"""Which slot a stream gets, and what of its token log is there already.

- **Its own history**: a slot remembers the tokens of its last stream; the next turn of a chat finds its
  history there and computes only what is new. Where stages cannot shorten a sequence (`can_trim`), a slot is
  of use only if the new stream goes on from its very end; else it is computed from the beginning.
- **Copies**: where another slot begins like the new stream, busy or not (system prompts, documents, lists of
  examples), the stages copy that beginning. The copy goes with the next micro-batch, before its rows; since
  all messages travel in order, each stage then holds of the source what is known of it here.
- **Leaders**: a stream whose beginning is just being read for another one waits for these rows, and gets a
  copy, too.

What is kept is kept by use: of the free slots a new stream gets the one that was of use least recently, where
a copy is a use of its source. So nothing is held beside the KV caches themselves.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

from cordee.generation.batches import SequenceCopy
from cordee.generation.slots import Slot, SlottedStream
from cordee.generation.tokenlog import common_prefix

# Fewer cached tokens than this do not decide which slot a stream gets: so few rows are soon computed again.
PREFIX_TOKENS_MIN = 8
# A copy has to bring at least this part of a context: libllama copies the whole cache of a sequence, which
# took as long as computing a seven-hundredth of its tokens (the starter model on one core).
COPIED_SHARE_MIN = 1 / 256
# To wait for another stream's rows has to save as many as usually travel beside decode rows, and half of
# one's own: else a short request would wait for the long one that came with it.
AWAITED_TOKENS_MIN = 128
AWAITED_SHARE_MIN = 1 / 2


class Prefixes:
    """See the module's docstring. `slots` are those of a scheduler, of `context` tokens each.

    `settled` says how many of a slot's tokens each stage has, or will have before what is sent next comes
    there.
    """

    def __init__(self, slots: Sequence[Slot], context: int, settled: Callable[[Slot], int]) -> None:
        self.can_trim = True
        self._slots = slots
        self._settled = settled
        self._copied_tokens_min = max(PREFIX_TOKENS_MIN, int(context * COPIED_SHARE_MIN))
        self._copies: list[SequenceCopy] = []  # one at most for each stream that begins
        self._uses = 0

    def choose(self, tokens: Sequence[int], free: Sequence[Slot]) -> Slot:
        """A free slot for a token log; it is left with those of its tokens that are the beginning of the log.

        The longest prefix decides, among slots where it saves at least as much as it throws away: chats that
        share no more than a system prompt must not take each other's slot. Else the slot with the least to
        lose: one without tokens worth keeping, or the one that was of use least recently. Else the one with
        most active neighbours, since the llama engine computes consecutive sequences in one call.
        """
        found = {slot: self.usable(slot.tokens, tokens) for slot in free}
        useful = [
            slot for slot in free if found[slot] >= max(PREFIX_TOKENS_MIN, len(slot.tokens) - found[slot])
        ]
        taken = {slot.sequence for slot in self._slots} - {slot.sequence for slot in free}

        def loss(slot: Slot) -> tuple[int, int, int]:
            worth_keeping = len(slot.tokens) >= PREFIX_TOKENS_MIN
            neighbours = len(taken & {slot.sequence - 1, slot.sequence + 1})
            return slot.used if worth_keeping else 0, -neighbours, slot.sequence

        if useful:
            slot = max(useful, key=lambda slot: (found[slot], -len(slot.tokens)))
        else:
            slot = min(free, key=loss)
        del slot.tokens[found[slot] :]
        return slot

    def usable(self, held: Sequence[int], tokens: Sequence[int]) -> int:
        """How many of the tokens that a slot holds are the beginning of a token log.

        The last token of a log is computed in any case: its logits give the next one.
        """
        common = min(common_prefix(held, tokens), max(len(tokens) - 1, 0))
        return common if self.can_trim or common == len(held) else 0

    def copy_best(self, slot: Slot, tokens: Sequence[int]) -> None:
        """Have another slot's tokens copied, if one has clearly more of a token log than `slot`, which begins
        like it."""
        lengths = {
            other: min(self.usable(other.tokens, tokens), self._settled(other))
            for other in self._slots
            if other is not slot and not other.restored
        }
        source = max(lengths, key=lambda other: lengths[other], default=slot)
        if source is not slot:
            self._copy(source, slot, lengths[source])

    def find_leader(self, stream: SlottedStream, others: Iterable[SlottedStream]) -> None:
        """Let a stream that has no row yet wait for those of another one that it shares, if that pays.

        All tokens in the logs of `others` are still to be sent, or on their way.
        """
        log, held = stream.log, len(stream.slot.tokens)
        wanted = log.tokens(0, len(log) - 1)
        enough = max(AWAITED_TOKENS_MIN, self._copied_tokens_min, AWAITED_SHARE_MIN * stream.rows_left)
        stream.leader, stream.awaited_tokens = None, 0
        for other in others if self.can_trim and not stream.is_scored else ():
            shared = common_prefix(other.log.tokens(0, len(other.log)), wanted)
            if shared > stream.awaited_tokens and shared - held >= enough:
                stream.leader, stream.awaited_tokens = other, shared

    def awaits(self, stream: SlottedStream, active: Collection[SlottedStream]) -> bool:
        """Whether a stream still waits for its leader's rows; once they are on their way they are copied."""
        leader, slot = stream.leader, stream.slot
        if leader is None:
            return False
        if leader in active and len(slot.tokens) < stream.awaited_tokens:
            if leader.slot.restored or len(leader.slot.tokens) < stream.awaited_tokens:
                return True
            self._copy(leader.slot, slot, stream.awaited_tokens)
        else:
            self.copy_best(slot, stream.log.tokens(0, len(stream.log)))
        stream.leader = None
        stream.cached = min(len(slot.tokens), len(stream.request.prompt))
        return False

    def take_copies(self) -> tuple[SequenceCopy, ...]:
        """The copies to make before the rows of the next micro-batch, in this order."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def use(self, slot: Slot) -> None:
        """A slot's tokens were of use just now."""
        self._uses += 1
        slot.used = self._uses

    def _copy(self, source: Slot, slot: Slot, length: int) -> None:
        if not self.can_trim or length - len(slot.tokens) < self._copied_tokens_min:
            return
        self.use(source)
        slot.tokens, slot.restored = source.tokens[:length], False
        self._copies.append(SequenceCopy(source.sequence, slot.sequence, length, slot.tenure))
