"""The recipe of the ternary story models; README.md beside this file says how it is run."""
