"""Worker processes: one process, one stage; their links, and their supervision by the parent."""
