"""From a checkpoint on disk to a program and a source of weights."""
