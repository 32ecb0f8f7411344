"""Where each request's KV lives: block pool, prefix hashes, tables. Counts only: neither numpy nor torch."""
