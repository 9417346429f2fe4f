"""Weights on their way: from the hub, from the disk, from node to node, checked chunk by chunk."""
