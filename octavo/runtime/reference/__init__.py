"""The definition of every op and of the sampler: numpy, float32, written to be read."""

from octavo.runtime.reference.runtime import ReferenceRuntime

__all__ = ["ReferenceRuntime"]
