"""What people type and read at a terminal: streams, keys, words that wrap."""
