"""Reads what a model is: a ModelSpec from a Hugging Face folder or a GGUF file."""

from octavo.models.hf_spec import read_hf_spec
from octavo.models.spec import ModelFiles, ModelSpec


def read_spec(files: ModelFiles, *, max_model_len: int | None = None) -> ModelSpec:
    """The spec of a model, with RoPE factors fixed for `max_model_len` (default: what the checkpoint can do).

    Raises:
        ModelFileError: a field that is missing, of the wrong type or out of bounds.
        UnsupportedModelError: an architecture, activation, RoPE kind or quantisation without a row.
        ConfigError: `max_model_len` beyond what the checkpoint can do.
    """
    if files.format == "gguf":
        from octavo.models.gguf_spec import read_gguf_spec  # the other format, not loaded for nothing

        return read_gguf_spec(files, max_model_len=max_model_len)
    return read_hf_spec(files, max_model_len=max_model_len)


def hold(files: ModelFiles) -> object:
    """What is read of the files is not read again while the result of this is held."""
    if files.format == "gguf":
        from octavo.models.gguf_file import GGUFFile

        return GGUFFile.open(files.path)
    return None
