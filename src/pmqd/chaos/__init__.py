"""The proof: producers, workers and faults by seed, and a checker that reads what happened from outside.

`python -m pmqd.chaos --jobs 20000 --faults 40 --seed 1` runs the real daemon on servers of its own (or on somebody's
staging), breaks what can break while jobs go through, heals, waits for the rest, and then proves every invariant from
a history that neither store has written.
"""
