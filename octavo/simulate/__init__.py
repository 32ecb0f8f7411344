"""What would happen: the engine's own scheduler on a trace, in virtual time, steps priced by a cost model."""
