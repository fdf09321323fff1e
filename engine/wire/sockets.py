"""The two socket classes. Each process binds one `Inbox`; whoever has something for it opens an `Outbox` to it."""

from __future__ import annotations

import logging
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import zmq

from engine.wire.addresses import tcp

T = TypeVar("T")
M = TypeVar("M", contravariant=True)
R = TypeVar("R")

log = logging.getLogger(__name__)

UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError, MemoryError)
"""What a decoder raises of bytes that are no message: bad syntax or types, bad UTF-8, nested too deep, too large."""


def endpoint(runtime_dir: str, name: str) -> str:
    """ZeroMQ address of the inbox of process `name`."""
    return f"ipc://{runtime_dir}/{name}.sock"


def _bind(socket: zmq.Socket[bytes], host: str) -> str:
    address = tcp(host)
    socket.setsockopt(zmq.IPV6, "[" in address)
    socket.bind(address)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def _connect(socket: zmq.Socket[bytes], address: str) -> None:
    socket.setsockopt(zmq.IPV6, "[" in address)
    socket.connect(address)


class Inbox(Generic[T]):
    """The bound end of a PUSH/PULL pair: messages of the union `kind` from any number of senders, in order
    of arrival (and in order of sending for each sender).

    Both ends run the same release, and only their user can reach the socket: a frame that is no message is a bug, or
    not ours. It is logged and left out, and what lies behind it is read.
    """

    def __init__(self, context: zmq.Context[Any], runtime_dir: str, name: str, kind: Any) -> None:
        self._open(context, name, kind)
        self._socket.bind(endpoint(runtime_dir, name))

    @classmethod
    def connected(cls, context: zmq.Context[Any], address: str, name: str, kind: Any) -> Inbox[T]:
        """The inbox of a process on another host than its one sender, which has bound `address` (`Outbox.bound`)."""
        inbox = cls.__new__(cls)
        inbox._open(context, name, kind)
        _connect(inbox._socket, address)
        return inbox

    def _open(self, context: zmq.Context[Any], name: str, kind: Any) -> None:
        self._name = name
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)

    def also_at(self, host: str) -> str:
        """Receive from other hosts as well: bind a free port of the address `host`. Returns where they connect to."""
        return _bind(self._socket, host)

    def fileno(self) -> int:
        """Descriptor for an event loop. It is edge-triggered: call `drain` until it returns nothing."""
        return int(self._socket.getsockopt(zmq.FD))

    def wait(self, seconds: float | None) -> bool:
        """Block until a message is there (True) or `seconds` have passed (False); None waits forever."""
        return self._socket.poll(None if seconds is None else int(seconds * 1000)) != 0

    def drain(self, most: int | None = None) -> list[T]:
        """All messages that are there now, or the first `most` of them, without waiting."""
        messages: list[T] = []
        while most is None or len(messages) < most:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                messages.append(self._decoder.decode(frame))
            except UNREADABLE as error:
                # Not the frame itself: it may hold a prompt, and so may what a type's error says of a value.
                kind = type(error).__name__
                log.error("The %s left out a frame of %d bytes that is no message: %s", self._name, len(frame), kind)
        return messages

    def close(self) -> None:
        self._socket.close(linger=0)


class Receiver(Protocol[R]):
    """What messages of a kind can be received with."""

    def wait(self, seconds: float | None) -> bool: ...

    def drain(self) -> list[R]: ...


class Sender(Protocol[M]):
    """What messages of a kind can be sent with."""

    def send(self, message: M) -> None: ...


class Outbox(Generic[T]):
    """The connecting end: `send` never blocks; messages wait in memory until the other side has bound."""

    def __init__(self, context: zmq.Context[Any], runtime_dir: str, name: str) -> None:
        self._open(context)
        self._socket.connect(endpoint(runtime_dir, name))

    @classmethod
    def to(cls, context: zmq.Context[Any], address: str) -> Outbox[T]:
        """To an inbox on another host (`Inbox.also_at`)."""
        outbox = cls.__new__(cls)
        outbox._open(context)
        _connect(outbox._socket, address)
        return outbox

    @classmethod
    def bound(cls, context: zmq.Context[Any], host: str) -> tuple[Outbox[T], str]:
        """To a process on another host, which connects to the address that is returned (`Inbox.connected`)."""
        outbox = cls.__new__(cls)
        outbox._open(context)
        return outbox, _bind(outbox._socket, host)

    def _open(self, context: zmq.Context[Any]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 5)

    def send(self, message: T) -> None:
        self._socket.send(self._encoder.encode(message), copy=True)

    def close(self, linger_ms: int = 500) -> None:
        """Close, giving what is unsent at most `linger_ms` milliseconds to leave."""
        self._socket.close(linger=linger_ms)
