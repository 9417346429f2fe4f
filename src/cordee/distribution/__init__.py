"""How weights get to a node: from the hub, from the disk, from other nodes, checked chunk by chunk."""
