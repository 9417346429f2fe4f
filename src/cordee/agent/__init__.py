"""The agent of a node: it joins what is pure with what is real, and is spoken to through a local socket."""
