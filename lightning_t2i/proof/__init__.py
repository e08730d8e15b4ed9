"""Proof of exact resume: a run that is killed again and again ends at the bits of one that is not."""
