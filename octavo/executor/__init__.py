"""Carries a step to one worker or many and brings its result back."""
