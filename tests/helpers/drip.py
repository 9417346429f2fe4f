"""An HTTP transport for official clients that hands responses over byte by byte."""

from collections.abc import Iterator

import httpx2


class _Drops(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            for place in range(len(chunk)):
                yield chunk[place : place + 1]

    def close(self) -> None:
        self._stream.close()


class Drip(httpx2.HTTPTransport):
    """Cuts what it receives at every byte."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; the response's body comes in drops."""
        response = super().handle_request(request)
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _Drops(response.stream)
        return response
