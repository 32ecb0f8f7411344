"""The CPU runtime: a C++ library called once per step through ctypes."""
