"""What this computer has: memory, devices, energy; and what fits on it."""
