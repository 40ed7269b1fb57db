"""Several runs of one process on one resident base.

member    each run in a thread of its own, of which one works at a time
joint     one forward and backward pass for all whose windows are there
"""
