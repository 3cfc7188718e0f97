"""The engine: batches across depths, one iteration of everything in flight at a time."""
