"""Writing checkpoints beside the process that trains: shared memory, the order of the writes, and the writer.

The trainer copies its tensors into memory that it shares with a process of its own (`client.WriterProcess`) and goes
on; that process (`process`, without torch) puts them on disk (`commit`). An order that was accepted is carried out even
if the trainer dies the moment after, because the memory belongs to both.
"""
