"""The cluster that `cordee demo` shows: three nodes on this machine, which may fall."""
