"""The tests mirror `acejax/`; how much of them runs is told by `tests.counts`."""
