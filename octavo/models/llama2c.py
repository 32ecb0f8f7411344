"""Converts a llama2.c checkpoint (weights and tokenizer in one file) to GGUF, so that everything after is one format.

The layout is that of karpathy/llama2.c, export version 0: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads,
vocab_size, seq_len), float32 tensors in the order of `_weights`, then the tokenizer: int32 longest token, and for each
token a float32 score, an int32 length and its bytes. Rotated pairs lie next to each other, as in a Llama GGUF.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelFileError
from octavo.models.gguf_file import DEFAULT_ALIGNMENT, MAGIC

Float32 = npt.NDArray[np.float32]

_HEADER = struct.Struct("<7i")
_ROPE_TABLES = 2  # cosines and sines, precomputed in the file
_NUM_SPECIAL, _NUM_BYTES = 3, 256  # <unk> <s> </s>, then one token per byte, then text
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # tokenizer.ggml.token_type
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def convert_llama2c(source: Path, out: Path, *, name: str) -> None:
    """Writes `out` as GGUF; equal input gives equal bytes.

    Raises:
        ModelFileError: sizes in the header that the file does not have.
    """
    raw = source.read_bytes()
    if len(raw) < _HEADER.size:
        raise ModelFileError(f"{source} is no llama2.c checkpoint: {len(raw)} bytes")
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = _HEADER.unpack_from(raw)
    if (
        min(dim, hidden, layers, heads, kv_heads, vocab, seq_len) < 1
        or dim % heads
        or vocab < _NUM_SPECIAL + _NUM_BYTES
    ):
        raise ModelFileError(f"{source} is no llama2.c checkpoint: its header is {_HEADER.unpack_from(raw)}")
    head_dim = dim // heads
    shapes = _weights(dim, hidden, layers, heads, kv_heads, vocab)
    num_floats = sum(int(np.prod(shape)) for _, shape in shapes) + _ROPE_TABLES * seq_len * (head_dim // 2)
    tokenizer_at = _HEADER.size + 4 * num_floats
    if tokenizer_at > len(raw):
        raise ModelFileError(f"{source} has {len(raw)} bytes, but its header makes it at least {tokenizer_at}")
    weights = np.frombuffer(raw, dtype="<f4", offset=_HEADER.size, count=num_floats)
    texts, scores = _tokens(source, raw, tokenizer_at, vocab)
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * _NUM_BYTES
    metadata: dict[str, tuple[int, Any]] = {
        "general.architecture": (_STRING, "llama"),
        "general.name": (_STRING, name),
        "llama.context_length": (_UINT32, seq_len),
        "llama.embedding_length": (_UINT32, dim),
        "llama.block_count": (_UINT32, layers),
        "llama.feed_forward_length": (_UINT32, hidden),
        "llama.rope.dimension_count": (_UINT32, head_dim),
        "llama.rope.freq_base": (_FLOAT32, 10_000.0),
        "llama.attention.head_count": (_UINT32, heads),
        "llama.attention.head_count_kv": (_UINT32, kv_heads),
        "llama.attention.layer_norm_rms_epsilon": (_FLOAT32, 1e-5),
        "tokenizer.ggml.model": (_STRING, "llama"),
        "tokenizer.ggml.tokens": (_ARRAY, (_STRING, texts)),
        "tokenizer.ggml.scores": (_ARRAY, (_FLOAT32, scores)),
        "tokenizer.ggml.token_type": (_ARRAY, (_INT32, types + [_NORMAL] * (vocab - len(types)))),
        "tokenizer.ggml.bos_token_id": (_UINT32, 1),
        "tokenizer.ggml.eos_token_id": (_UINT32, 2),
        "tokenizer.ggml.eot_token_id": (_UINT32, 1),  # these models were trained on texts that <s> divides
        "tokenizer.ggml.unknown_token_id": (_UINT32, 0),
        "tokenizer.ggml.add_bos_token": (_BOOL, True),
    }
    with out.open("wb") as file:
        _write_gguf(file, metadata, dict(_tensors(shapes, weights)))


def _weights(
    dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> list[tuple[str, tuple[int, ...]]]:
    """(GGUF name, shape) in the file's order; "{}" stands for each layer in turn."""
    kv_dim = dim // heads * kv_heads
    return [
        ("token_embd", (vocab, dim)),
        ("blk.{}.attn_norm", (layers, dim)),
        ("blk.{}.attn_q", (layers, dim, dim)),
        ("blk.{}.attn_k", (layers, kv_dim, dim)),
        ("blk.{}.attn_v", (layers, kv_dim, dim)),
        ("blk.{}.attn_output", (layers, dim, dim)),
        ("blk.{}.ffn_norm", (layers, dim)),
        ("blk.{}.ffn_gate", (layers, hidden, dim)),
        ("blk.{}.ffn_down", (layers, dim, hidden)),
        ("blk.{}.ffn_up", (layers, hidden, dim)),
        ("output_norm", (dim,)),
    ]


def _tensors(shapes: list[tuple[str, tuple[int, ...]]], weights: Float32) -> Iterator[tuple[str, Float32]]:
    at = 0
    for name, shape in shapes:
        count = int(np.prod(shape))
        block = weights[at : at + count].reshape(shape)
        at += count
        if "{}" not in name:
            yield f"{name}.weight", block
            continue
        for layer, tensor in enumerate(block):
            yield f"{name.format(layer)}.weight", tensor


def _tokens(source: Path, raw: bytes, at: int, vocab: int) -> tuple[list[str], list[float]]:
    """Texts as SentencePiece writes them (a space is U+2581, bytes are <0x00> ...) and scores."""
    texts, scores = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(_NUM_BYTES))], []
    at += 4  # the longest token, which only a C program needs
    try:
        for index in range(vocab):
            score, length = struct.unpack_from("<fi", raw, at)
            at += 8 + length
            if length < 0 or at > len(raw):
                raise ModelFileError(f"{source}: token {index} runs past the end of the file")
            scores.append(score)
            if index >= len(texts):
                texts.append(raw[at - length : at].decode().replace(" ", "\u2581"))
    except (struct.error, UnicodeDecodeError) as error:
        raise ModelFileError(f"{source}: the tokenizer is truncated or corrupt: {error}") from None
    return texts, scores


def _write_gguf(file: BinaryIO, metadata: dict[str, tuple[int, Any]], tensors: dict[str, Float32]) -> None:
    """GGUF version 3 with float32 tensors."""
    file.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, (kind, value) in metadata.items():
        file.write(_value(_STRING, key) + struct.pack("<I", kind) + _value(kind, value))
    offset = 0
    for name, tensor in tensors.items():
        dims = tensor.shape[::-1]
        file.write(_value(_STRING, name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset))
        offset += _padded(tensor.nbytes)
    file.write(bytes(_padded(file.tell()) - file.tell()))
    for tensor in tensors.values():
        file.write(tensor.tobytes())
        file.write(bytes(_padded(tensor.nbytes) - tensor.nbytes))


def _value(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        encoded = value.encode()
        return struct.pack("<Q", len(encoded)) + bytes(encoded)
    if kind == _ARRAY:
        item_kind, items = value
        return struct.pack("<IQ", item_kind, len(items)) + b"".join(_value(item_kind, item) for item in items)
    return struct.pack({_UINT32: "<I", _INT32: "<i", _FLOAT32: "<f", _BOOL: "<?"}[kind], value)


def _padded(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
