"""Asking a server things with as little client work as possible, so that a benchmark measures the server."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any
from urllib.parse import urlsplit


def get(url: str) -> Any:
    """GET a JSON document."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.loads(answer.read())


def generate(url: str, body: dict[str, Any]) -> Any:
    """One plain /generate call."""
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.loads(answer.read())


async def stream(url: str, body: dict[str, Any]) -> int:
    """One streamed /generate call over a raw socket; returns the bytes of its answer.

    Raises RuntimeError when the stream ends before its [DONE].
    """
    payload = json.dumps(body | {"stream": True}).encode()
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 22)
    head = (
        f"POST /generate HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
    received = 0
    tail = b""
    while data := await reader.read(1 << 16):
        received += len(data)
        tail = (tail + data)[-64:]
    writer.close()
    if b"[DONE]" not in tail:
        raise RuntimeError(f"the stream broke off: {tail!r}")
    return received
