"""Messages between the front and the engine process: msgpack frames, there over a socket, back through a pipe.

A frame is: u32 little-endian payload length, u8 message kind, payload (msgpack of the message's dataclass, decoded by
its declared types). Length is bounded, kinds are a closed list, nothing is ever unpickled. A pipe, because writing to
it takes half as long as to a socket, once a step, and what was written can be read whatever becomes of the writer.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from dataclasses import dataclass
from typing import Any, get_args

import msgspec

from octavo.config import EngineConfig
from octavo.errors import EngineDeadError
from octavo.messages import RequestDelta, StepOutputs, ToEngine, ToFront

MAX_FRAME = 256 << 20  # bytes; a prompt of a million tokens is 5 MB
MAX_UNSENT_RECORDS = 4096
_HEADER = struct.Struct("<IB")


@dataclass(slots=True)
class StartEngine:
    """The first message to a new engine process."""

    config: EngineConfig
    model_name: str
    model_format: str
    model_path: str


_KINDS: tuple[type, ...] = (StartEngine, *get_args(ToEngine), *get_args(ToFront))
_KIND_OF = {cls: kind for kind, cls in enumerate(_KINDS)}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS: list[msgspec.msgpack.Decoder[Any]] = [msgspec.msgpack.Decoder(cls) for cls in _KINDS]


def encode(message: object) -> bytes:
    """One frame."""
    payload = _ENCODER.encode(message)
    if len(payload) > MAX_FRAME:
        raise ValueError(f"message of {len(payload)} bytes is over the limit of {MAX_FRAME}")
    return _HEADER.pack(len(payload), _KIND_OF[type(message)]) + payload


def decode(kind: int, payload: bytes | bytearray | memoryview) -> Any:
    """The message in a frame. Raises EngineDeadError on a kind or payload that no peer of ours would send."""
    if kind >= len(_KINDS):
        raise EngineDeadError(f"unknown message kind {kind} on the engine channel")
    try:
        return _DECODERS[kind].decode(payload)
    except msgspec.DecodeError as error:
        raise EngineDeadError(f"malformed {_KINDS[kind].__name__} on the engine channel: {error}") from error


def take_frames(received: bytearray) -> list[Any]:
    """The messages of all whole frames, which are cut off."""
    messages = []
    offset = 0
    while len(received) - offset >= _HEADER.size:
        length, kind = _HEADER.unpack_from(received, offset)
        if length > MAX_FRAME:
            raise EngineDeadError(f"a frame of {length} bytes on the engine channel is over {MAX_FRAME}")
        end = offset + _HEADER.size + length
        if len(received) < end:
            break
        messages.append(decode(kind, received[offset + _HEADER.size : end]))
        offset = end
    del received[:offset]
    return messages


class EngineChannel:
    """The engine's end: never blocks on a slow front. Outputs that cannot be sent are merged until they can."""

    def __init__(self, sock: socket.socket, pipe: int) -> None:
        self._sock, self._pipe = sock, pipe
        sock.setblocking(False)
        os.set_blocking(pipe, False)
        self._arrivals = select.poll()
        self._arrivals.register(sock, select.POLLIN)
        self._received = bytearray()
        self._unsent = b""  # the rest of a frame that is under way
        self._held: StepOutputs | None = None  # outputs merged behind it
        self._held_index: dict[str, RequestDelta] = {}
        self.closed = False

    def receive(self, *, wait: bool) -> list[Any]:
        """What has arrived, the first MiB of it; with `wait`, at least one unless the front is gone (then `closed`)."""
        messages: list[Any] = []
        while not self.closed:
            if self._arrivals.poll(0):  # most steps have nothing to read: asking is cheaper than being refused
                self._read_available()
            if self._received:
                messages.extend(take_frames(self._received))
            if messages or not wait or self.closed:
                break
            writers = [self._pipe] if self._unsent or self._held else []
            _, writable, _ = select.select([self._sock], writers, [])
            if writable:
                self._flush()
        return messages

    def send(self, message: object) -> None:
        """Sends a start-up message, waiting for room; `closed` when the front is gone (it found the error first)."""
        os.set_blocking(self._pipe, True)
        self._unsent = encode(message)
        self._flush()
        os.set_blocking(self._pipe, False)

    def publish(self, outputs: StepOutputs) -> None:
        """Sends outputs as far as the pipe takes them; the rest is merged into what goes next."""
        if not (outputs.deltas or outputs.records or outputs.memory):
            return
        if self._unsent or self._held:
            self._merge(outputs)
        else:
            self._unsent = encode(outputs)
        self._flush()

    def close(self) -> None:
        """Closes both ways; the front sees the end."""
        self._sock.close()
        os.close(self._pipe)

    def _read_available(self) -> None:
        try:
            data = self._sock.recv(1 << 20)
        except ConnectionError:
            data = b""
        self._received += data
        self.closed = not data

    def _flush(self) -> None:
        try:
            while self._unsent or self._held:
                if not self._unsent and self._held is not None:
                    self._unsent, self._held, self._held_index = encode(self._held), None, {}
                self._unsent = self._unsent[os.write(self._pipe, self._unsent) :]
        except BlockingIOError:
            return
        except ConnectionError:
            self.closed = True
            self._unsent, self._held, self._held_index = b"", None, {}

    def _merge(self, outputs: StepOutputs) -> None:
        held = self._held = self._held or StepOutputs([], [])
        held.memory = outputs.memory or held.memory
        held.records.extend(outputs.records)
        del held.records[:-MAX_UNSENT_RECORDS]
        for delta in outputs.deltas:
            earlier = self._held_index.get(delta.request_id)
            if earlier is None:
                held.deltas.append(delta)
                self._held_index[delta.request_id] = delta
            else:
                merge_delta(earlier, delta)


def merge_delta(earlier: RequestDelta, later: RequestDelta) -> None:
    """Adds what a later step brought to a delta that was not taken yet."""
    earlier.token_ids.extend(later.token_ids)
    if later.logprobs is not None:
        earlier.logprobs = [*(earlier.logprobs or []), *later.logprobs]
    earlier.num_cached_tokens = later.num_cached_tokens or earlier.num_cached_tokens
    earlier.queue_time = later.queue_time or earlier.queue_time
    earlier.finish_reason, earlier.stop_reason = later.finish_reason, later.stop_reason
    earlier.cumulative_logprob = later.cumulative_logprob
    earlier.error, earlier.error_kind, earlier.retry_after = later.error, later.error_kind, later.retry_after
    earlier.prompt_logprobs = earlier.prompt_logprobs or later.prompt_logprobs
    earlier.vector = later.vector
    earlier.alone = later.alone
