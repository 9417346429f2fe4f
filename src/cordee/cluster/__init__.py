"""The cluster's decisions, pure: what is known of the nodes, what should run where, what a node does next."""
