"""Opens the weights of a model, whatever they are stored as."""

from octavo.errors import ConfigError
from octavo.models.spec import ModelFiles, ModelSpec
from octavo.runtime.base import WeightSource


def open_weights(files: ModelFiles, spec: ModelSpec, *, load_format: str = "auto", seed: int = 0) -> WeightSource:
    """The source of a model's tensors. `load_format` "auto" follows the files, "dummy" makes random weights of `seed`.

    Raises:
        ConfigError: a load format that these files are not.
        ModelFileError: missing, truncated or corrupt files.
    """
    if load_format == "dummy":
        from octavo.models.dummy import DummyWeights

        return DummyWeights(spec, seed)
    stored = "gguf" if files.format == "gguf" else "safetensors"
    if load_format not in ("auto", stored):
        raise ConfigError(f"--load-format {load_format}: {files.path} is {stored}; take auto or {stored}")
    if stored == "gguf":
        from octavo.models.gguf_weights import GGUFWeights

        return GGUFWeights(files, spec)
    from octavo.models.safetensors_weights import SafetensorsWeights

    return SafetensorsWeights(files, spec)
