"""Log-probabilities in the two shapes that OpenAI has for them."""

import codecs
from collections.abc import Sequence
from typing import Any

from cordee.engine.vocabulary import Vocabulary
from cordee.generation.request import Choice

LEAST = -9999.0  # OpenAI's value for a token that cannot be; JSON has no infinity


def chat_logprobs(vocabulary: Vocabulary, choices: Sequence[Choice]) -> dict[str, Any]:
    """A chat choice's `logprobs`: an entry for each token, with its bytes and the likeliest at its place."""
    content = [
        _entry(vocabulary, choice.token, choice.logprob)
        | {"top_logprobs": [_entry(vocabulary, *each) for each in choice.top_logprobs]}
        for choice in choices
    ]
    return {"content": content, "refusal": None}


class Echo:
    """A prompt as a completion repeats it: its text, and the bytes that each token has of that.

    `given` is the text that the prompt was made from, if it was one. The begin-of-text token, which is put in
    front of it, and the space that some vocabularies put there are not shown.
    """

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], given: str | None = None) -> None:
        self.tokens = prompt
        self.pieces = [vocabulary.piece(token, special=True) for token in prompt]
        begins = prompt[0] == vocabulary.bos
        if begins and not (given or "").startswith(vocabulary.bos_text):
            self.pieces[0] = b""
        self.text = b"".join(self.pieces).decode("utf-8", "replace")
        if given is not None and self.text == f" {given}" and self.pieces[begins].startswith(b" "):
            self.pieces[begins] = self.pieces[begins][1:]
            self.text = given


class LegacyLogprobs:
    """A completion choice's `logprobs`, chunk by chunk: parallel lists, and where each token begins.

    `text_offset` counts characters of the reply's text, from its beginning; a token within a character begins
    where that does.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def echoed(self, echo: Echo, choices: Sequence[Choice]) -> dict[str, list[Any]]:
        """The lists for a prompt, before anything else; `choices` are its tokens but the first, of which
        nothing can be said."""
        begin = self._advance(echo.pieces[0])
        lists = self.append(choices, echo.pieces[1:])
        first = (self._name(echo.tokens[0]), None, None, begin)
        return {name: [value, *lists[name]] for name, value in zip(lists, first, strict=True)}

    def append(
        self, choices: Sequence[Choice], pieces: Sequence[bytes] | None = None
    ) -> dict[str, list[Any]]:
        """The lists for the next tokens; `pieces` are their bytes in the text, if not their own."""
        if pieces is None:
            pieces = [self._vocabulary.piece(choice.token) for choice in choices]
        return {
            "tokens": [self._name(choice.token) for choice in choices],
            "token_logprobs": [_finite(choice.logprob) for choice in choices],
            "top_logprobs": [self._top(choice) for choice in choices],
            "text_offset": [self._advance(piece) for piece in pieces],
        }

    def _top(self, choice: Choice) -> dict[str, float]:
        """Names to log-probabilities; of tokens with the same name the likeliest counts."""
        names: dict[str, float] = {}
        for token, logprob in (*choice.top_logprobs, (choice.token, choice.logprob)):
            names.setdefault(self._name(token), _finite(logprob))
        return names

    def _name(self, token: int) -> str:
        """A token's text; OpenAI's form for bytes that are not whole characters."""
        data = self._vocabulary.piece(token, special=True)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _advance(self, piece: bytes) -> int:
        start = self._offset
        self._offset += len(self._decoder.decode(piece))
        return start


def _finite(logprob: float | None) -> float:
    assert logprob is not None, "log-probabilities were asked for"
    return max(logprob, LEAST)


def _entry(vocabulary: Vocabulary, token: int, logprob: float | None) -> dict[str, Any]:
    data = vocabulary.piece(token, special=True)
    return {
        "token": data.decode("utf-8", "replace"),
        "logprob": _finite(logprob),
        "bytes": list(data),
    }
