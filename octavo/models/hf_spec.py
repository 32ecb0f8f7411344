"""A ModelSpec from a Hugging Face folder: config.json through a row of architectures.py, and generation_config.json."""

from dataclasses import replace
from typing import Any

from octavo.errors import ConfigError, UnsupportedModelError
from octavo.models.architectures import ARCHITECTURES, Architecture, activation_of, architecture_of
from octavo.models.hf_config import Fields, read_json
from octavo.models.rope import RopeParameters, make_rope
from octavo.models.spec import LayerSpec, ModelFiles, ModelSpec
from octavo.program.ops import Rope
from octavo.sampling_params import BOUNDS

MAX_LAYERS = 1024
MAX_VOCAB = 1 << 24
MAX_HEADS = 4096
MAX_CONTEXT = 1 << 24
MIN_THETA = 1.001  # its logarithm is a divisor
_DTYPES = ("float32", "bfloat16", "float16")
_SLIDING = "sliding_attention"
_LAYER_TYPES = (_SLIDING, "full_attention")
_GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_hf_spec(files: ModelFiles, *, max_model_len: int | None = None) -> ModelSpec:
    """The spec of a folder with a config.json. Raises as models.reader.read_spec does."""
    path = files.path / "config.json"
    outer = Fields(read_json(path), path)
    fields = outer.child("text_config") if outer.has("text_config") else outer
    row = _row_of(outer, fields)
    _refuse_unbuilt(row, outer, fields)
    return _SpecReader(row, outer, fields).read(files, max_model_len)


def _row_of(outer: Fields, fields: Fields) -> Architecture:
    """The row by `model_type`; a nested text model goes by its own type when it names one."""
    source = fields if fields.has("model_type") else outer
    if source.has("model_type"):
        return architecture_of(source.text("model_type"))
    known = ", ".join(row.name for row in ARCHITECTURES)
    raise source.wrong("model_type", f"the architecture's name (known ones: {known})")


def _refuse_unbuilt(row: Architecture, outer: Fields, fields: Fields) -> None:
    for source in (outer, fields):
        if source.has("quantization_config"):
            method = source.child("quantization_config").raw("quant_method")
            raise UnsupportedModelError(
                f"quantised checkpoints ({method}) are not supported; use the float checkpoint or a GGUF file"
            )
    for key, only in row.only.items():
        if fields.has(key) and fields.raw(key) != only:
            raise UnsupportedModelError(f"{row.name} with {key}={fields.raw(key)!r} is not supported, only {only!r}")


class _SpecReader:
    """Reads one config through one row."""

    def __init__(self, row: Architecture, outer: Fields, fields: Fields) -> None:
        self._row = row
        self._outer = outer
        self._fields = fields

    def read(self, files: ModelFiles, max_model_len: int | None) -> ModelSpec:
        row, fields = self._row, self._fields
        hidden_size = self._integer("hidden_size")
        num_heads = self._integer("num_attention_heads", high=MAX_HEADS)
        num_kv_heads = self._integer("num_key_value_heads", num_heads, high=MAX_HEADS)
        if num_heads % num_kv_heads:
            raise fields.wrong(row.key("num_attention_heads"), f"a multiple of num_key_value_heads ({num_kv_heads})")
        head_dim = self._head_dim(hidden_size, num_heads)
        vocab_size = self._integer("vocab_size", high=MAX_VOCAB)
        context = self._integer("max_position_embeddings", high=MAX_CONTEXT)
        ropes = self._rope_parameters(context)
        reach, served = _context_lengths({} if row.context_is_scaled else ropes, context, max_model_len)
        has_bias = bool(row.bias_key) and fields.boolean(str(row.bias_key), False)
        spec = ModelSpec(
            architecture=row.name,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=self._integer("intermediate_size", row.mlp_ratio * hidden_size or None),
            num_layers=self._integer("num_hidden_layers", high=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=reach,
            max_model_len=served,
            layers=self._layers(ropes, head_dim, served),
            norm_eps=fields.number(row.key("rms_norm_eps"), self._default("rms_norm_eps"), high=1.0),
            activation=activation_of(row, fields.text(row.key("hidden_act"), self._default("hidden_act"))),
            qkv_bias=has_bias,
            attention_out_bias=has_bias,
            tie_word_embeddings=self._tied(),
            stored_dtype=self._stored_dtype(),
        )
        spec = replace(spec, **row.flags)
        if row.positions == "learned":
            spec = replace(spec, learned_positions=context + spec.position_offset)
        if row.extras is not None:
            spec = replace(spec, **row.extras(fields, hidden_size))
        return self._with_generation(files, spec)

    def _with_generation(self, files: ModelFiles, spec: ModelSpec) -> ModelSpec:
        """End-of-sequence ids and sampling defaults: generation_config.json wins, as in transformers."""
        source = self._fields if self._fields.has("eos_token_id") else self._outer
        eos = source.token_ids("eos_token_id", spec.vocab_size)
        path = files.path / "generation_config.json"
        if not path.exists():
            return replace(spec, eos_token_ids=eos)
        generation = Fields(read_json(path), path)
        defaults = {
            name: type(BOUNDS[name][0])(generation.number(name, low=BOUNDS[name][0], high=BOUNDS[name][1]))
            for name in _GENERATION_DEFAULTS
            if generation.has(name)
        }
        eos = generation.token_ids("eos_token_id", spec.vocab_size) or eos
        return replace(spec, eos_token_ids=eos, generation_defaults=defaults)

    def _default(self, name: str) -> Any:
        return self._row.defaults.get(self._row.key(name))

    def _integer(self, name: str, default: int | None = None, *, high: int = 1 << 24) -> int:
        known = self._default(name)
        return self._fields.integer(self._row.key(name), default if known is None else known, high=high)

    def _head_dim(self, hidden_size: int, num_heads: int) -> int:
        if self._row.positions == "rope" and (self._fields.has("head_dim") or self._default("head_dim")):
            return self._integer("head_dim", high=MAX_HEADS)
        if hidden_size % num_heads:
            key = self._row.key("hidden_size")
            raise self._fields.wrong(key, f"a multiple of {num_heads} attention heads, since head_dim is not given")
        return hidden_size // num_heads

    def _tied(self) -> bool:
        source = self._fields if self._fields.has("tie_word_embeddings") else self._outer
        return source.boolean("tie_word_embeddings", bool(self._row.defaults.get("tie_word_embeddings", False)))

    def _stored_dtype(self) -> str:
        for source in (self._fields, self._outer):
            for key in ("dtype", "torch_dtype"):
                if source.has(key):
                    name = source.text(key).removeprefix("torch.")
                    if name not in _DTYPES:
                        raise source.wrong(key, f"one of {', '.join(_DTYPES)}")
                    return name
        return "float32"

    def _layers(self, ropes: dict[str, RopeParameters], head_dim: int, max_model_len: int) -> tuple[LayerSpec, ...]:
        windows = self._windows(self._integer("num_hidden_layers", high=MAX_LAYERS))
        made: dict[str, Rope] = {}
        for layer_type, parameters in ropes.items():
            rotary_dim = int(head_dim * self._rotary_share(layer_type))
            made[layer_type] = make_rope(parameters, rotary_dim=rotary_dim, max_model_len=max_model_len)
        layer_types = [_SLIDING if window else "full_attention" for window in windows]
        return tuple(LayerSpec(w, made.get(t)) for w, t in zip(windows, layer_types, strict=True))

    def _windows(self, num_layers: int) -> list[int]:
        """Sliding window of each layer; 0 is global."""
        row, fields = self._row, self._fields
        usual = row.defaults.get("sliding_window", 0)
        window = fields.integer("sliding_window", usual, low=0, high=MAX_CONTEXT)
        if row.windows == "none" or not window:
            return [0] * num_layers
        if row.windows == "all":
            return [window] * num_layers
        if row.windows == "upper" and not fields.boolean("use_sliding_window", False):
            return [0] * num_layers
        if fields.has("layer_types"):
            layer_types = fields.texts("layer_types", num_layers)
            if not set(layer_types) <= set(_LAYER_TYPES):
                raise fields.wrong("layer_types", f"a list of {' and '.join(_LAYER_TYPES)}")
            return [window if t == _SLIDING else 0 for t in layer_types]
        if row.windows == "upper":
            first = fields.integer("max_window_layers", 28, low=0)
            return [window if index >= first else 0 for index in range(num_layers)]
        period = fields.integer("sliding_window_pattern", row.defaults["sliding_window_pattern"])
        return [window if (index + 1) % period else 0 for index in range(num_layers)]

    def _rope_fields(self, layer_type: str) -> Fields:
        """`rope_parameters` (transformers 5, per layer type or not) or `rope_scaling`; an empty object when absent."""
        name = "rope_parameters" if self._fields.has("rope_parameters") else "rope_scaling"
        found = self._fields.child(name)
        is_nested = any(found.has(t) for t in _LAYER_TYPES)
        return found.child(layer_type) if is_nested or self._has_own_rope(layer_type) else found

    def _has_own_rope(self, layer_type: str) -> bool:
        """True for Gemma's local layers: a base of their own, and never the scaling of the global ones."""
        return layer_type == _SLIDING and self._row.windows == "pattern"

    def _rotary_share(self, layer_type: str) -> float:
        outer = self._fields.number("partial_rotary_factor", 1.0, high=1.0)
        return self._rope_fields(layer_type).number("partial_rotary_factor", outer, high=1.0)

    def _rope_parameters(self, context: int) -> dict[str, RopeParameters]:
        """By layer type; empty for learned positions."""
        if self._row.positions == "learned":
            return {}
        return {t: self._rope_of(t, context) for t in _LAYER_TYPES}

    def _rope_of(self, layer_type: str, context: int) -> RopeParameters:
        fields, rope = self._fields, self._rope_fields(layer_type)
        theta_key = "rope_local_base_freq" if self._has_own_rope(layer_type) else "rope_theta"
        theta = fields.number(theta_key, self._row.defaults.get(theta_key, 10_000.0), low=MIN_THETA)
        kind = rope.text("rope_type", rope.text("type", "default"))
        original = fields.integer(
            "original_max_position_embeddings",
            rope.integer("original_max_position_embeddings", context, low=2, high=MAX_CONTEXT),
            low=2,
            high=MAX_CONTEXT,
        )
        factor = rope.number("factor", context / original if kind in ("yarn", "longrope") else 1.0, low=1e-6, high=1e4)
        return RopeParameters(
            max_position_embeddings=context,
            kind="longrope" if kind == "su" else kind,  # the older name
            theta=rope.number("rope_theta", theta, low=MIN_THETA),
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=rope.number("attention_factor") if rope.has("attention_factor") else None,
            beta_fast=rope.number("beta_fast", 32.0, low=1e-6),
            beta_slow=rope.number("beta_slow", 1.0, low=1e-6),
            mscale=rope.number("mscale", 0.0),
            mscale_all_dim=rope.number("mscale_all_dim", 0.0),
            truncate=rope.boolean("truncate", True),
            low_freq_factor=rope.number("low_freq_factor", 1.0, low=1e-6),
            high_freq_factor=rope.number("high_freq_factor", 4.0, low=1e-6),
            short_factor=rope.numbers("short_factor") if rope.has("short_factor") else (),
            long_factor=rope.numbers("long_factor") if rope.has("long_factor") else (),
        )


def _context_lengths(ropes: dict[str, RopeParameters], context: int, max_model_len: int | None) -> tuple[int, int]:
    """(what the checkpoint can do, what is served). Dynamic NTK reaches farther only when that is asked for."""
    main = ropes.get("full_attention")
    reach = main.reach if main else context
    if max_model_len is None and main and main.kind == "dynamic":
        return reach, context
    return reach, served_length(max_model_len, reach)


def served_length(max_model_len: int | None, reach: int) -> int:
    """Tokens of a request: as many as were asked for, else all that the model can do. Raises ConfigError for more."""
    if max_model_len is not None and max_model_len > reach:
        raise ConfigError(f"max_model_len {max_model_len} is more than the model's {reach} positions: at most {reach}")
    return reach if max_model_len is None else max_model_len
