"""The CPU runtime: one C++ library (native/) behind ctypes that runs a whole step in one call."""

from octavo.runtime.native.runtime import NativeRuntime

__all__ = ["NativeRuntime"]
