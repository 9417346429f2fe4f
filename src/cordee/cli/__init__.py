"""The verbs of the `cordee` program."""
