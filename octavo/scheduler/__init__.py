"""Who runs in the next step. Counts only: neither numpy nor torch."""
