"""Experts that live on a slower tier and pass through the device one after the other.

record     how one expert lies in memory or in a file
content    what a section of it stands for: numbers, or codes of 4 or 8 bits
store      what holds the records: `ram`, `file`, and `stock`, the files of a folder as they are
ahead      what the kernel is told of the next ones
pending    AdamW of an expert, put off until it is next loaded
stream     all experts of a model: the order of loading, gradients, what is still to be done
experts    the module that stands in a layer for its experts
window     the experts of a layer for all micro-batches of a step at once
"""
