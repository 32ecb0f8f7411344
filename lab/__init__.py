"""Experiments that anyone re-runs: every number about Octavo comes from here, with its command, machine and date."""
