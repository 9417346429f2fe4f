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


class LegacyLogprobs:
    """A completion choice's `logprobs`, chunk by chunk: parallel lists, and where each token begins.

    `text_offset` counts characters of the answer; a token within a character begins where that does.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def append(self, choices: Sequence[Choice]) -> dict[str, list[Any]]:
        """The lists for the next tokens."""
        return {
            "tokens": [self._name(choice.token) for choice in choices],
            "token_logprobs": [_finite(choice.logprob) for choice in choices],
            "top_logprobs": [self._top(choice) for choice in choices],
            "text_offset": [self._advance(choice.token) for choice in choices],
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

    def _advance(self, token: int) -> int:
        start = self._offset
        self._offset += len(self._decoder.decode(self._vocabulary.piece(token)))
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
