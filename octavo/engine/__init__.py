"""The loop around the scheduler, its process, and the two ways to call it (LLM, AsyncEngine)."""
