"""Octavo: an LLM serving engine that an engineer reads in an afternoon."""

__version__ = "0.1.0"
