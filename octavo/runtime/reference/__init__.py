"""The definition of every op: numpy, float32, written to be read."""
