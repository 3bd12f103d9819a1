"""What this machine remembers: the index, the chunk files, the queues to and from the node."""
