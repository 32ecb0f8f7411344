"""How a byte-level BPE vocabulary wants text cut before merging: one row per `tokenizer.ggml.pre` name.

A GGUF file only names its pre-tokenizer; the patterns are those of the `tokenizer.json` each model was published
with. Only rows that reproduce a published tokenizer's ids on test vectors are listed: a name that is missing here is
refused, because a wrong cut gives plausible text from the wrong tokens.
"""

from dataclasses import dataclass

from octavo.errors import UnsupportedModelError

# Radford et al. 2019 (GPT-2): contractions, letters, numbers, the rest; a leading space stays with its word.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The cl100k family; Llama 3 takes up to three digits together, Qwen one by one.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Mistral's Tekken also cuts where a word turns to upper case, and knows no contractions.
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
# DeepSeek LLM spells out cased letters instead of using \p{L}. Escaped are those that Unicode normalisation changes.
_CASED_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1f7d}ᾀ-ᾴᾶ-ᾼ\x{1fbe}ῂ-ῄῆ-ῌῐ-\x{1fd3}ῖ-\x{1fdb}ῠ-Ῥῲ-ῴῶ-ῼ"
    r"ℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212a}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How one family of byte-level BPE models prepares text.

    `patterns` are applied in order, each cutting the pieces the former left: matches and what lies between them become
    pieces of their own.
    """

    patterns: tuple[str, ...]
    nfc: bool = False  # Unicode NFC first
    ignore_merges: bool = False  # a piece that is a token as a whole needs no merges
    add_bos: bool = False  # when the file does not say


_LLAMA3 = PreTokenizer((_CL100K % "{1,3}",), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_CL100K % "",), nfc=True)
_DIGITS_GPT2 = PreTokenizer((_DIGIT, _GPT2))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": PreTokenizer((_DIGIT, _GPT2), nfc=True),
    "mpt": PreTokenizer((_GPT2,), nfc=True),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-llm": PreTokenizer(("[\r\n]", _CASED_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, _DIGIT)),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT)),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The row of `name`, the value of `tokenizer.ggml.pre`.

    Raises:
        UnsupportedModelError: no such row.
    """
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(
            f"the GGUF file names the pre-tokenizer {name!r}, which is not built here (known: {known}). "
            "Use the model's Hugging Face folder, which carries its tokenizer.json"
        ) from None
