"""Turns a step into the runtime's input arrays; owns the rows."""
