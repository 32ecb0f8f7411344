"""One StepRecord per step, and what is made of it."""
