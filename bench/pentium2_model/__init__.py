"""Measuring a Pentium II without one: see README.md beside this file."""
