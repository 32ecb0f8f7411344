"""The text half of a model: its tokenizer and chat template, as the config asks for them."""

from dataclasses import dataclass
from pathlib import Path

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.models.spec import ModelFiles
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


@dataclass(slots=True)
class Text:
    """Both are None where an engine takes and gives token ids only."""

    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None


def load_text(config: EngineConfig, files: ModelFiles, *, chat_template: str | None = None) -> Text:
    """Loads tokenizer and template. `chat_template`: the source to use instead of the model's own.

    With load_format="dummy" a folder without tokenizer files gives an engine without text.
    """
    if config.skip_tokenizer_init:
        return Text(None, None)
    if config.tokenizer is None and config.load_format == "dummy" and not has_tokenizer(files):
        return Text(None, None)
    source: ModelFiles | Path = files
    if config.tokenizer is not None:
        source = Path(config.tokenizer).expanduser()
        if not source.exists():
            raise ConfigError(f"--tokenizer {config.tokenizer}: no such file or folder")
    tokenizer = load_tokenizer(source)
    template = chat_template or tokenizer.chat_template
    return Text(tokenizer, ChatTemplate(template, tokenizer) if template else None)
