"""The same jobs for pmqd and for those whom people would otherwise pick: how each is filled, and how its workers start."""
