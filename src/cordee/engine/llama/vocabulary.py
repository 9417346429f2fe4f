"""The vocabulary of a GGUF by libllama in this process: text to token ids and back, special tokens, template.

Only the header's tokenizer is loaded (libllama's `vocab_only`), no weights. A vocabulary is untrusted, and
libllama ends the process on many that are wrong: when it loads them, when it spells a token, or at some text.
So this is only for processes that may end: workers, and the children of `cordee.engine.vocabulary`.
"""

import array
import ctypes
import itertools
import re
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from cordee.engine.llama import libllama
from cordee.engine.vocabulary_messages import CONTROL, HIDDEN, Table, text_bytes
from cordee.errors import BadModelFile, BadRequest, UnsupportedModel

PIECE_BYTES = 256  # nearly all pieces are shorter; of a longer one libllama says the size
PIECE_BYTES_MAX = 1 << 20  # no valid vocabulary has a longer token: the file is damaged
# All pieces together: of the largest vocabularies met they have 3 MB.
PIECES_BYTES_MAX = 64 << 20

TOKENIZER_NONE = 0  # enum llama_vocab_type in llama.h: LLAMA_VOCAB_TYPE_NONE
TOKENIZER_BPE = 2  # LLAMA_VOCAB_TYPE_BPE
ATTRIBUTE_UNKNOWN, ATTRIBUTE_CONTROL = 1 << 0, 1 << 3  # enum llama_token_attr

# libllama splits the text of many BPE models (gpt-oss, Mistral, DeepSeek, Falcon) by std::regex, which takes
# about 370 bytes of stack per character of a match: 30,000 equal characters end the process with SIGSEGV. So
# longer runs are cut: of one class after 512 (fits the smallest thread stack in use, macOS's 512 kB), of
# anything but white space after 4096. No sentence has such runs; the tokens still spell the same text.
LONG_RUN = re.compile(r"[^\W\d_]{512}|\d{512}|\s{512}|[^\w\s]{512}|_{512}|\S{4096}")
CONTROLS_MAX = 1000  # libllama's search for control tokens is quadratic in their number: 80,000 take 10 s


class LlamaVocabulary:
    """A loaded vocabulary. `size` counts tokens; ids are 0 to size - 1. Not thread-safe while closing.

    `name` is what messages call the model, by default its file's path.

    Raises:
        BadModelFile: libllama cannot read the file.
        UnsupportedModel: the file has no tokenizer, as a slice before the last has none; or libllama does not
            know its tokenizer or its architecture yet.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.name = name or str(path)
        self._library = libllama.load()
        model = self._load(Path(path))
        self._free = weakref.finalize(self, self._library.llama_model_free, model)
        self.handle = self._library.llama_model_get_vocab(model)
        if self._library.llama_vocab_type(self.handle) == TOKENIZER_NONE:
            self.close()
            raise UnsupportedModel(
                f"{self.name} has no tokenizer (slices before the last have none): use the whole model's file"
            )
        self.size = self._library.llama_vocab_n_tokens(self.handle)
        self.bos = self._special(self._library.llama_vocab_bos)
        self.eos = self._special(self._library.llama_vocab_eos)
        self.wants_bos = bool(self._library.llama_vocab_get_add_bos(self.handle))
        self.end_of_generation = frozenset(
            token for token in range(self.size) if self._library.llama_vocab_is_eog(self.handle, token)
        )
        template = self._library.llama_model_chat_template(model, None)
        self.chat_template = None if template is None else template.decode("utf-8", "replace")

    def table(self) -> Table:
        """Everything but the way from text to tokens.

        Raises:
            BadModelFile: a token, or all of them, are absurdly long.
        """
        pieces, ends = bytearray(), array.array("I")
        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        view, spell, handle = memoryview(buffer), self._library.llama_token_to_piece, self._open()
        for token in range(self.size):  # a tight loop: 200,000 tokens take a third of a second
            count = spell(handle, token, buffer, PIECE_BYTES, 0, True)
            pieces += view[:count] if count >= 0 else self.piece(token, special=True)
            ends.append(len(pieces))
            if len(pieces) > PIECES_BYTES_MAX:
                raise BadModelFile(f"{self.name}: its tokens have more than {PIECES_BYTES_MAX} bytes in all")
        return Table(
            bos=self.bos,
            eos=self.eos,
            bos_text=self._text(self.bos),
            eos_text=self._text(self.eos),
            wants_bos=self.wants_bos,
            end_of_generation=tuple(sorted(self.end_of_generation)),
            chat_template=self.chat_template,
            pieces=bytes(pieces),
            ends=ends.tobytes(),
            flags=bytes(map(self._flags, range(self.size), self._attributes)),
            control_starts="".join(sorted({name[0] for name in self._control_names})),
            infill={field: token for field, token in self._infill().items() if token is not None},
        )

    def close(self) -> None:
        """Free libllama's memory. The vocabulary is unusable afterwards; closing twice is harmless."""
        self.handle = None
        self._free()

    def tokenize(self, text: str, *, special: bool = True, add_bos: bool) -> list[int]:
        """Give the token ids of a text.

        `special` reads control tokens written in the text, such as <|im_start|>, as tokens; without it
        they are plain text. `add_bos` puts the model's BOS in front if the model's file wants one and the
        text (a rendered chat template, say) does not begin with it already.

        Raises:
            BadRequest: the text is longer than TEXT_BYTES_MAX, or is not valid Unicode.
        """
        text_bytes(text)
        tokens = [token for piece in self._pieces(text, special) for token in self._tokenize(piece, special)]
        if add_bos and self.wants_bos and self.bos is not None and tokens[:1] != [self.bos]:
            tokens.insert(0, self.bos)
        return tokens

    def piece(self, token: int, special: bool = False) -> bytes:
        """Give a token's raw bytes, perhaps part of a character; b'' for control tokens unless `special`."""
        self._check(token)
        length = PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(length)
            count = self._library.llama_token_to_piece(self._open(), token, buffer, length, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            if -count > PIECE_BYTES_MAX:
                raise BadModelFile(f"{self.name}: token {token} has an absurd length")
            length = -count

    def is_control(self, token: int) -> bool:
        """Tell whether a token is a control token, which no plain text gives."""
        self._check(token)
        return bool(self._library.llama_vocab_is_control(self._open(), token))

    def control_spans(self, text: str) -> list[tuple[int, int]]:
        """Where in a text the names of control tokens stand: (start, end); if two match, the longer."""
        return [match.span() for match in self._controls.finditer(text)]

    def _load(self, path: Path) -> int:
        params = self._library.llama_model_default_params()
        params.vocab_only = True
        params.n_gpu_layers = 0
        return libllama.load_model(path, params, self.name)

    def _pieces(self, text: str, special: bool) -> Iterator[str]:
        """Cut a text into pieces that libllama can take; see LONG_RUN and CONTROLS_MAX."""
        controls = self.control_spans(text) if special else []
        cuts = [start for start, _ in controls[CONTROLS_MAX::CONTROLS_MAX]]
        if self._library.llama_vocab_type(self._open()) == TOKENIZER_BPE:
            starts, ends = [start for start, _ in controls], [end for _, end in controls]
            gaps = zip([0, *ends], [*starts, len(text)], strict=True)
            cuts += [run.end() for start, end in gaps for run in LONG_RUN.finditer(text, start, end)]
        edges = [0, *sorted(cuts), len(text)]
        return (text[start:end] for start, end in itertools.pairwise(edges))

    @cached_property
    def _control_names(self) -> set[str]:
        controls = (token for token, each in enumerate(self._attributes) if each & ATTRIBUTE_CONTROL)
        return {self._text(token) for token in controls} - {""}

    @cached_property
    def _controls(self) -> re.Pattern[str]:
        """Matches the name of any control token."""
        names = sorted(self._control_names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 2  # a token is at least a byte, but some tokenizers put a space in front
        while True:
            buffer = (self._library.llama_token * room)()
            count = self._library.llama_tokenize(self._open(), data, len(data), buffer, room, False, special)
            if count >= 0:
                return buffer[:count]
            room = -count

    def _open(self) -> int:
        if self.handle is None:
            raise ValueError(f"the vocabulary of {self.name} is closed")
        return self.handle

    @cached_property
    def _attributes(self) -> list[int]:
        """Those of each token, as enum llama_token_attr has them."""
        get, handle = self._library.llama_vocab_get_attr, self._open()
        return [get(handle, token) for token in range(self.size)]

    def _flags(self, token: int, attributes: int) -> int:
        """CONTROL and HIDDEN, as `Table` has them."""
        if not attributes & (ATTRIBUTE_CONTROL | ATTRIBUTE_UNKNOWN):
            return 0
        return (CONTROL if attributes & ATTRIBUTE_CONTROL else 0) | (HIDDEN if not self.piece(token) else 0)

    def _infill(self) -> dict[str, int | None]:
        """The tokens for filling in, as the file names them or as libllama knows them by their texts."""
        library = self._library
        return {
            "prefix": self._special(library.llama_vocab_fim_pre),
            "suffix": self._special(library.llama_vocab_fim_suf),
            "middle": self._special(library.llama_vocab_fim_mid),
            "repository": self._special(library.llama_vocab_fim_rep),
            "separator": self._special(library.llama_vocab_fim_sep),
        }

    def _special(self, getter: Callable[[int | None], int]) -> int | None:
        token = getter(self.handle)
        return token if 0 <= token < self.size else None

    def _text(self, token: int | None) -> str:
        if token is None:
            return ""
        return self._library.llama_vocab_get_text(self.handle, token).decode("utf-8", "replace")

    def _check(self, token: int) -> None:
        """Refuse ids outside the vocabulary: libllama would end the process."""
        if not 0 <= token < self.size:
            raise BadRequest(f"token id {token} is outside the model's vocabulary of {self.size} tokens")
