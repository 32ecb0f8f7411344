"""Records made once a row and step: msgspec's structs, a third of a dataclass's time and no work for the collector.

The offline engine also runs where only numpy and torch are, on a machine with a card and no network; there they are
dataclasses.
"""

from typing import Any

try:
    from msgspec import Struct
    from msgspec import field as struct_field
except ImportError:
    from dataclasses import dataclass
    from dataclasses import field as struct_field  # type: ignore[no-redef]

    class Struct:  # type: ignore[no-redef]
        """Stands for msgspec's: the same fields, options that only make it faster or shorter ignored."""

        def __init_subclass__(cls, **_options: bool) -> None:
            dataclass(cls)


__all__ = ["Struct", "asdict", "struct_field"]


def asdict(record: Struct) -> dict[str, Any]:
    """Its fields by name, as they are."""
    return {name: getattr(record, name) for name in type(record).__annotations__}
