"""The model as data: ops, programs, and how they are printed."""
