"""A model of the cluster whose node runs here, for `cordee run` and `demo`: asked over the node's API."""

import http.client
import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, Self
from urllib.parse import urlsplit

from cordee.access.local_key import LocalKey
from cordee.agent import control
from cordee.cli.conversation import GenerationOptions
from cordee.cli.status import state_of
from cordee.errors import DoesNotFit, NotRunning, StageFailed
from cordee.generation.request import TextChunk
from cordee.terminal import output

POLL_SECONDS = 0.3
# How long a model may fit nowhere before that is an error: nodes may still be starting.
UNPLACED_SECONDS = 10.0
SILENCE_SECONDS = 60.0  # while it answers, the API sends something every few seconds, if only a keep-alive
LINE_BYTES_MAX = 1 << 20


class ClusterModel:
    """A model of the cluster, ready to answer. Made by `ClusterModel.find`."""

    def __init__(self, model: str, api: str, key: LocalKey | None = None) -> None:
        self.name = model
        self._headers = {"Content-Type": "application/json"}
        if key is not None:  # which the API wants if it was started with --local-key
            self._headers["Authorization"] = key.header
        url = urlsplit(api)
        self._host, self._port, self._path = url.hostname or "", url.port, url.path

    @classmethod
    def find(cls, model: str) -> Self | None:
        """The model, if an agent runs here and its cluster has it, loaded or not."""
        try:
            if _model(model) is None:
                return None
            nodes = control.ask("GET", "/nodes", kind=dict[str, Any])["nodes"]
        except NotRunning:
            return None
        return cls(model, nodes[0]["api"], LocalKey.found())

    def wait(self) -> None:
        """Deploy the model if nobody has, and wait until the cluster serves it.

        Raises:
            DoesNotFit: the cluster cannot run it; says why.
            NotRunning: the node here has ended.
        """
        if not (_model(self.name) or {}).get("deployed"):
            deployed = control.ask("POST", "/deploy", control.Deploy(self.name), control.Deployed)
            output.note_shortened(self.name, deployed.lacks)
        unplaced_until = time.monotonic() + UNPLACED_SECONDS
        with output.loading() as report:
            reported = ""
            while (model := _model(self.name) or {}).get("state") != "serving":
                text = state_of(model) if model.get("deployed") else f"{self.name} is unknown"
                if model.get("state") != "unplaced":
                    unplaced_until = time.monotonic() + UNPLACED_SECONDS
                elif time.monotonic() > unplaced_until:
                    raise DoesNotFit(f"The cluster does not run {self.name}. {model['why']}")
                if text != reported:
                    report(text)
                reported = text
                time.sleep(POLL_SECONDS)

    def answer(
        self, messages: Sequence[Mapping[str, str]], generation: GenerationOptions
    ) -> Generator[TextChunk]:
        """See ConversationModel.answer.

        Raises:
            CordeeError: as the API says.
        """
        body = {
            "model": self.name,
            "messages": messages,
            "max_tokens": generation.max_tokens,
            **generation.sampling(),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection(self._host, self._port, timeout=SILENCE_SECONDS)
        with closing(connection):
            try:
                path = f"{self._path}/chat/completions"
                connection.request("POST", path, json.dumps(body), self._headers)
                response = connection.getresponse()
                if response.status != 200:
                    raise _error(json.loads(response.read()))
                yield from _chunks(response)
            except (OSError, http.client.HTTPException) as error:
                raise StageFailed("The node on this machine ended, or no longer answers.") from error


def _model(name: str) -> dict[str, Any] | None:
    models: list[dict[str, Any]] = control.ask("GET", "/status", kind=dict[str, Any])["models"]
    return next((model for model in models if model["name"] == name), None)


def _chunks(response: http.client.HTTPResponse) -> Generator[TextChunk]:
    """Server-sent events as chunks; those of thinking have no text. Each event counts as a token, until the
    last one has the number."""
    tokens, finish = 0, None
    while line := response.readline(LINE_BYTES_MAX):
        data = line.strip().removeprefix(b"data: ")
        if not line.startswith(b"data: ") or data == b"[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise _error(event)
        for choice in event["choices"]:
            delta = choice["delta"]
            text = delta.get("content") or ""
            finish = choice["finish_reason"] or finish
            if text or delta.get("reasoning_content"):
                tokens += 1
                yield TextChunk(text=text, completion_tokens=tokens)
        if usage := event.get("usage"):
            yield TextChunk(
                text="",
                finish_reason=finish,
                prompt_tokens=usage["prompt_tokens"],
                cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
                completion_tokens=usage["completion_tokens"],
            )
            return
    raise StageFailed("The answer broke off: the node on this machine ended.")


def _error(body: dict[str, Any]) -> Exception:
    return control.error_of(body["error"]["code"], body["error"]["message"])
