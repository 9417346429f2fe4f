"""A child process that tries grammars for its parent, before they come near a stream.

Run as `python -m cordee.worker.grammar_child SOCKET PATH NAME`. It loads the vocabulary and answers each
`Grammar` with a `GrammarVerdict`, until its parent ends, or asks nothing for IDLE_SECONDS.

llguidance cannot be interrupted: some grammars of a few kilobytes take it minutes, or gigabytes. So each is
tried in a fork of this process, which has the vocabulary already, and which the system ends when it has used
its time or its memory. Where processes cannot fork (Windows), this process itself ends then, and its parent
starts another.
"""

import faulthandler
import os
import signal
import sys
import time
from contextlib import suppress
from random import Random

import msgspec

from cordee.engine.child import answer, receive
from cordee.engine.llama.vocabulary import LlamaVocabulary
from cordee.errors import CordeeError
from cordee.generation.request import Grammar
from cordee.grammar.grammar import STEP_SECONDS, GrammarTokenizer, check, refusal
from cordee.privacy import no_core_dumps
from cordee.system import processes
from cordee.worker.grammar_messages import GrammarVerdict, grammar_decoder, verdict_decoder

IDLE_SECONDS = 600.0  # a child takes some 100 MB and starts within a second
# Of a core, for one grammar: to compile it, and to take TRIAL_STEPS tokens. An object of 3,000 optional
# properties, or 32 kB of GBNF made to be slow, take a second on a machine that does not hurry.
TRIAL_SECONDS = 2.0
TRIAL_STEPS = 32
HERE_SECONDS = 10.0  # by the clock, where a trial cannot be given time of a core
# What a trial may take beside the vocabulary; the largest grammars that are of use take 40 MB.
TRIAL_BYTES = 256 << 20
# Of the stack: as much as threads that compile have at least, wherever that is done later.
STACK_BYTES = 8 << 20


def main() -> int:
    """Load, then answer; 0 unless something is wrong with this program."""
    no_core_dumps()
    os.set_blocking(sys.stderr.fileno(), False)  # its parent reads that when it has ended
    end, path, name = sys.argv[1:]
    link = processes.link_to_parent(end)
    try:
        tokenizer = GrammarTokenizer(LlamaVocabulary(path, name))
        _ = tokenizer.native
    except CordeeError as error:
        answer(link, GrammarVerdict.of(error))
        return 0
    answer(link, GrammarVerdict())
    if not processes.CAN_FORK:
        processes.limit_growth(TRIAL_BYTES)
    while True:
        try:
            grammar = receive(link, IDLE_SECONDS, grammar_decoder)
        except (EOFError, OSError):  # the parent ended, or has asked nothing for long
            return 0
        tried = _tried_apart if processes.CAN_FORK else _tried_here
        answer(link, tried(grammar, tokenizer))


def _tried_apart(grammar: Grammar, tokenizer: GrammarTokenizer) -> GrammarVerdict:
    """The verdict of a fork of this process, or what follows from how it ended."""
    readable, writable = os.pipe()
    process = os.fork()  # this process has no other thread
    if process == 0:
        try:
            _limit_this_process()
            os.write(writable, msgspec.msgpack.encode(_tried(grammar, tokenizer)))  # it fits the pipe
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable, "rb") as answer:
        said = answer.read()
    _, status = os.waitpid(process, 0)
    if said:
        return verdict_decoder.decode(said)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return GrammarVerdict.of(
            _too_slow(grammar, f"{TRIAL_SECONDS:.0f} s of computing do not suffice to compile it")
        )
    reason = f"it needs more than {TRIAL_BYTES >> 20} MB: use fewer and shorter repetitions and alternatives"
    return GrammarVerdict.of(refusal(grammar.kind, reason))


def _tried_here(grammar: Grammar, tokenizer: GrammarTokenizer) -> GrammarVerdict:
    """The verdict of this process, which ends if that takes too much time, whatever its threads do."""
    faulthandler.dump_traceback_later(HERE_SECONDS, exit=True)
    try:
        return _tried(grammar, tokenizer)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _limit_this_process() -> None:
    import resource

    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends it
    signal.setitimer(signal.ITIMER_PROF, TRIAL_SECONDS)
    processes.limit_growth(TRIAL_BYTES)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))


def _tried(grammar: Grammar, tokenizer: GrammarTokenizer) -> GrammarVerdict:
    """Compile it and follow it for a few tokens, at random: some costs only show then."""
    try:
        state = check(grammar, tokenizer)
    except CordeeError as error:
        return GrammarVerdict.of(error)
    except MemoryError:
        return GrammarVerdict.of(refusal(grammar.kind, "it needs too much memory"))
    random = Random(grammar.text)
    with suppress(CordeeError):  # a limit that the model's own tokens may never meet
        for _ in range(TRIAL_STEPS):
            started = time.process_time()
            allowed = state.allowed()
            allowed[list(tokenizer.end_of_generation)] = False
            tokens = allowed.nonzero()[0]
            if not len(tokens):
                break
            state.accept(int(tokens[random.randrange(len(tokens))]))
            if time.process_time() - started > STEP_SECONDS:
                reason = f"a token of it takes more than {STEP_SECONDS} s of computing"
                return GrammarVerdict.of(_too_slow(grammar, reason))
    return GrammarVerdict()


def _too_slow(grammar: Grammar, reason: str) -> CordeeError:
    return refusal(
        grammar.kind, f"it is too complex ({reason}): use fewer patterns, alternatives and repetitions"
    )
