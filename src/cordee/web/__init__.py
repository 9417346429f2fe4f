"""The page: what a browser gets, and the session of whoever typed a key into it."""
