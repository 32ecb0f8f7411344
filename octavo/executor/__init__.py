"""Carries a step to the worker and brings its result back."""
