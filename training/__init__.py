"""Training of the ternary story models; README.md beside this file says how to run it."""
