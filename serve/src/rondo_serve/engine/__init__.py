"""The engine: batches across depths, one iteration of everything in flight at a time.

arena       pages of keys and values, and the tables that find them
packing     attention over tokens of many rows, each at its own iteration
rows        what is in flight: a row, and the tokens of it that are in the loop
passes      prelude, one iteration, coda, over whatever is in flight
prefixes    what prompts have in common
schedule    who goes next
engine      the tick, and the thread that ticks
opening     a checkpoint and settings made into an engine
"""
