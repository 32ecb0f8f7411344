"""Builds a `tokenizers` tokenizer from the metadata of a GGUF file.

Two kinds are built, as named by `tokenizer.ggml.model` in the GGUF specification
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

- "gpt2": byte-level BPE (Radford et al. 2019) with its merges and a named pre-tokenizer;
- "llama": SentencePiece BPE (Kudo and Richardson 2018) with scores and byte fallback. The file holds no merges: a
  piece may arise from each split of it into two pieces, and SentencePiece takes the highest score first.

Every length and type is checked, so that a damaged file ends in a ModelFileError and never in wrong ids.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.hf_config import Fields
from octavo.text.pretokenizers import pre_tokenizer

SPACE = "\u2581"  # SentencePiece's visible space


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def build_gguf_tokenizer(metadata: dict[str, Any], path: Path = Path("GGUF")) -> Tokenizer:
    """The tokenizer that the `tokenizer.ggml.*` keys of a file describe.

    Control and unknown tokens become special tokens, user-defined ones plain added tokens. `add_bos_token` and
    `add_eos_token` become the post-processor.

    Raises:
        ModelFileError: a key is missing or inconsistent.
        UnsupportedModelError: a tokenizer kind or pre-tokenizer that is not built.
    """
    fields = Fields(metadata, path)
    kind = fields.text("tokenizer.ggml.model")
    tokens = _strings(fields, "tokenizer.ggml.tokens")
    types = _token_types(fields, len(tokens))
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level_bpe(fields, tokens)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece_bpe(fields, tokens, types), True
    else:
        raise UnsupportedModelError(
            f"the GGUF file has a tokenizer of kind {kind!r}; built are 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE)"
        )
    _add_tokens(tokenizer, tokens, types)
    _add_post_processor(tokenizer, fields, tokens, add_bos)
    return tokenizer


def token_id(fields: Fields, key: str, num_tokens: int) -> int | None:
    """The token id stored under `key`, or None when the file has none. Raises ModelFileError when out of range."""
    return fields.integer(key, low=0, high=num_tokens - 1) if fields.has(key) else None


def _byte_level_bpe(fields: Fields, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    if not fields.has("tokenizer.ggml.pre"):
        raise UnsupportedModelError(
            "the GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre), and guessing it would give wrong "
            "token ids: convert the model again with a converter that writes it"
        )
    pre = pre_tokenizer(fields.text("tokenizer.ggml.pre"))
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [_merge(line) for line in _strings(fields, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(_bpe(vocab, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece_bpe(fields: Fields, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    for key in ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"):
        if fields.raw(key):
            raise UnsupportedModelError(f"the GGUF file asks for SentencePiece normalisation ({key}), not built here")
    scores = fields.raw("tokenizer.ggml.scores")
    is_list = isinstance(scores, list) and len(scores) == len(tokens)
    if not is_list or not all(isinstance(s, float) and not math.isnan(s) for s in scores):
        raise fields.wrong("tokenizer.ggml.scores", f"a list of {len(tokens)} numbers")
    unknown = token_id(fields, "tokenizer.ggml.unknown_token_id", len(tokens))
    unknown_token = None if unknown is None else tokens[unknown]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = merges_from_scores(tokens, scores, types)
    tokenizer = Tokenizer(_bpe(vocab, merges, unk_token=unknown_token, fuse_unk=True, byte_fallback=True))

    escape = normalizers.Replace(" ", SPACE)
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.boolean("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = escape
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE vocabulary, first to last.

    SentencePiece joins the two neighbours whose joined piece has the highest score, the leftmost first; a list of
    merges ordered by that score does the same. Splits of one piece tie: there the ids of their parts decide, as in
    the `tokenizer.json` files that are published for such models.
    """
    ids = {t: i for i, t in enumerate(tokens) if types[i] in (TokenType.NORMAL, TokenType.USER_DEFINED)}
    merges: list[tuple[str, str]] = []
    for i in sorted(ids.values(), key=lambda i: (-scores[i], i)):
        piece = tokens[i]
        splits = [
            (piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in ids and piece[cut:] in ids
        ]
        if len(splits) > 1:
            splits.sort(key=lambda split: (ids[split[0]], ids[split[1]]))
        merges += splits
    return merges


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **settings: Any) -> models.BPE:
    try:
        return models.BPE(vocab, merges, **settings)
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"GGUF: tokens and merges do not fit together: {error}") from error


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if (
            kind == TokenType.NORMAL or not token or token == f"[PAD{i}]"
        ):  # fill names of converters: no text means them
            continue
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == TokenType.USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _add_post_processor(tokenizer: Tokenizer, fields: Fields, tokens: Sequence[str], add_bos: bool) -> None:
    template: list[str] = ["$A"]
    used: list[tuple[str, int]] = []
    for name, default in (("bos", add_bos), ("eos", False)):
        if not fields.boolean(f"tokenizer.ggml.add_{name}_token", default):
            continue
        key = f"tokenizer.ggml.{name}_token_id"
        number = token_id(fields, key, len(tokens))
        if number is None:
            raise ModelFileError(f"GGUF: the tokenizer adds a {name} token, but {key} is missing")
        used.append((tokens[number], number))
        template.insert(0 if name == "bos" else len(template), tokens[number])
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)


def _token_types(fields: Fields, num_tokens: int) -> list[int]:
    types = fields.raw("tokenizer.ggml.token_type")
    if types is None:
        return [int(TokenType.NORMAL)] * num_tokens
    kinds: list[int] = types if isinstance(types, list) else []
    if len(kinds) != num_tokens or {*map(type, kinds)} != {int} or not 1 <= min(kinds) <= max(kinds) <= len(TokenType):
        raise fields.wrong("tokenizer.ggml.token_type", f"a list of {num_tokens} numbers from 1 to 6")
    return kinds


def _merge(line: str) -> tuple[str, str]:
    left, space, right = line.partition(" ")
    if not (left and space and right):
        raise ModelFileError(f"GGUF: tokenizer.ggml.merges has {line[:60]!r}, which is not two pieces and a space")
    return left, right


def _strings(fields: Fields, key: str) -> list[str]:
    values = fields.raw(key)
    if not isinstance(values, list) or {*map(type, values)} != {str}:
        raise fields.wrong(key, "a list of strings that is not empty")
    return values
