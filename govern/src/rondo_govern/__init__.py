"""Governance: who may spend how much depth, what was spent, and a log that can be checked."""
