"""Text <-> token ids: a thin layer over Hugging Face's `tokenizers` library, loaded from a folder or a GGUF file.

Decoding is defined here and not by the library, so that a stream can do it token by token: a token *is* a byte string
(`token_bytes`), text is the concatenation of those bytes read as UTF-8, and bytes that are not UTF-8 become U+FFFD the
way the Unicode standard recommends (one for each maximal part of a character). The library does the same, with two
exceptions. For SentencePiece vocabularies, where a model emits bytes that are not UTF-8, it gives up the whole run of
byte tokens, Octavo only the broken ones. For byte-level BPE it may read an added token such as "õ" as bytes, although
added tokens are plain text.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, processors

from octavo.errors import ContextLengthError, InvalidValueError, ModelFileError, UnsupportedModelError
from octavo.models.gguf_file import GGUFFile
from octavo.models.hf_config import Fields, read_json
from octavo.models.spec import ModelFiles
from octavo.text.gguf_tokenizer import SPACE, build_gguf_tokenizer, token_id

LONG_TEXT = 4096  # characters; from here on the library works without the GIL, which it only does for batches
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (Radford et al. 2019): printable Latin-1 stands for itself, the rest moves up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


class Tokenizer:
    """The tokenizer of one model.

    Attributes:
        vocab_size: number of tokens, added ones included. The model's embedding may have more rows.
        bos_token_id, eos_token_id: None when the model has none.
        special_ids: tokens that `skip_special_tokens` leaves out.
        special_tokens: texts by name (`bos_token`, `eos_token`, `unk_token`, `pad_token`), for chat templates.
        chat_template: Jinja source, or None.
        strips_leading_space: True when decoding drops the space that stands before the first word (SentencePiece
            with a space prefix).
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        vocab_size: int | None = None,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._byte_level, self.strips_leading_space = _decoding(core)
        # the exact bytes that one token stands for, b"" for an id without a token; asked for each token, so no method
        self.token_bytes = functools.cache(self._spell)
        self.vocab_size = vocab_size or core.get_vocab_size(with_added_tokens=True)
        self.special_tokens = special_tokens or {}
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self._added = core.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, the same as Hugging Face's `tokenizer(text)`.

        Where `text` contains the name of a special token (say `<|im_end|>`) it becomes that token: rendered chat
        templates need it, and raw completions get what they would get from Hugging Face.

        Args:
            text: any string that can be UTF-8.
            add_special_tokens: add what the model wants around a prompt (a BOS token, mostly). Rendered chat
                templates bring their own: pass False.

        Raises:
            InvalidValueError: `text` holds lone surrogates.
        """
        if len(text) >= LONG_TEXT:
            return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        self._check_text(text)
        return list(self._core.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, on all cores, with the GIL released."""
        for text in texts:
            self._check_text(text)
        encoded = self._core.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encoded]

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, told from its length alone. (A tokenizer that drops whitespace
        or joins unknown characters may get by with fewer.)"""
        return -(-len(text) // self._longest_token)

    @functools.cached_property
    def _longest_token(self) -> int:
        return max(map(len, self._core.get_vocab(with_added_tokens=True)))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token are passed over. No spaces are tidied up around punctuation."""
        kept = (i for i in ids if not (skip_special_tokens and i in self.special_ids))
        text = b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def token_text(self, token: int) -> str:
        """Text of one token as people read it; parts of a character show as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _spell(self, token: int) -> bytes:
        name = self._core.id_to_token(token) if 0 <= token < self.vocab_size else None
        if name is None:
            return b""
        if self._byte_level:
            try:
                return name.encode() if token in self._added else bytes(map(_BYTE_OF_CHARACTER.__getitem__, name))
            except KeyError:
                return name.encode()
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes.fromhex(name[3:5])
        return name.replace(SPACE, " ").encode()

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._core.token_to_id(text)

    @staticmethod
    def _check_text(text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidValueError(
                f"the text cannot be UTF-8: lone surrogate at character {error.start}", param="prompt"
            ) from None


def load_tokenizer(files: ModelFiles | Path) -> Tokenizer:
    """The tokenizer of a model: from `tokenizer.json` and its companions in a folder, or from a GGUF file.

    Raises:
        ModelFileError: no tokenizer there, or a damaged one.
        UnsupportedModelError: a kind of tokenizer that is not built.
    """
    path = files if isinstance(files, Path) else files.path
    return _load_folder(path) if path.is_dir() else _load_gguf(path)


def refuse_hopeless(tokenizer: Tokenizer, text: str, max_model_len: int, *, param: str) -> None:
    """Raises ContextLengthError for a prompt that is too long whatever its tokens are, without tokenising it."""
    if len(text) > max_model_len and (fewest := tokenizer.fewest_tokens(text)) >= max_model_len:
        raise ContextLengthError(
            f"the prompt has {len(text)} characters, so {fewest} tokens or more; the context is {max_model_len} "
            "tokens: shorten the prompt",
            param=param,
        )


def has_tokenizer(files: ModelFiles | Path) -> bool:
    """True when the model brings a tokenizer. A folder with a bare config.json (dummy weights) has none."""
    path = files if isinstance(files, Path) else files.path
    return path.is_file() or any((path / name).exists() for name in ("tokenizer.json", *_SLOW_FILES))


_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")


def _load_gguf(path: Path) -> Tokenizer:
    metadata = GGUFFile.open(path).metadata
    core = build_gguf_tokenizer(metadata, path)
    fields = Fields(metadata, path)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]  # type: ignore[assignment]  # checked by the builder
    special: dict[str, str] = {}
    for name, key in zip(_SPECIAL_NAMES, ("bos", "eos", "unknown", "padding"), strict=True):
        number = token_id(fields, f"tokenizer.ggml.{key}_token_id", len(tokens))
        if number is not None:
            special[name] = tokens[number]
    template = fields.text("tokenizer.chat_template", "") or None
    return Tokenizer(core, vocab_size=len(tokens), special_tokens=special, chat_template=template)


def _load_folder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        slow = [name for name in _SLOW_FILES if (folder / name).exists()]
        found = f"only {', '.join(slow)}, the older format" if slow else "no tokenizer files"
        raise ModelFileError(
            f"{folder} has no tokenizer.json ({found}). Make one with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"{file}: {error}") from error
    config = _read_json(folder / "tokenizer_config.json")
    special = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
    for name, text in _read_json(folder / "special_tokens_map.json").items():
        if name in _SPECIAL_NAMES and name not in special and (found_text := _token_text(text)) is not None:
            special[name] = found_text
    _apply_add_tokens(core, config, special)
    return Tokenizer(core, special_tokens=special, chat_template=_folder_template(folder, config))


def _apply_add_tokens(core: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str]) -> None:
    """Honour `add_bos_token` and `add_eos_token` of tokenizer_config.json, which override tokenizer.json."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    before, after = (
        [special[n]] if config.get(f"add_{n}") and n in special else [] for n in ("bos_token", "eos_token")
    )
    used = [(token, core.token_to_id(token)) for token in dict.fromkeys([*before, *after])]
    if any(number is None for _, number in used):
        raise ModelFileError(f"tokenizer_config.json adds {used[0][0]!r}, which is not in tokenizer.json")
    core.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=used)


def _folder_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template: `chat_template.jinja`, else the config's own string or its entry named "default"."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelFileError(f"{file}: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of them")
    return template


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, or {} when there is no such file."""
    return read_json(file) if file.exists() else {}


def _token_text(value: object) -> str | None:
    """A special token as tokenizer_config.json writes it: a string, or an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _decoding(core: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """(byte-level?, leading space stripped?) from the library's decoder, so that the bytes of a token are known.

    Raises:
        UnsupportedModelError: a decoder for which text is not the concatenation of its tokens' bytes.
    """
    steps = _decoder_steps(core.decoder)
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return True, False
    if {"Replace", "ByteFallback"} <= kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return False, "Strip" in kinds
    names = ", ".join(step["type"] for step in steps) or "none"
    raise UnsupportedModelError(
        f"a tokenizer with the decoder {names} is not built; built are ByteLevel (BPE) and Replace + ByteFallback "
        "(SentencePiece)"
    )


def _decoder_steps(decoder: decoders.Decoder | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    description = json.loads(decoder.__getstate__())  # JSON, the decoder's part of a tokenizer.json
    return description["decoders"] if description["type"] == "Sequence" else [description]
