"""What differs between operating systems, each thing under one name: POSIX (Linux, macOS), and Windows.

`windows.py` alone calls Windows, and is imported there only. On POSIX the names here stand for Python's own
functions wherever there is one: nothing is between them and the system.
"""
