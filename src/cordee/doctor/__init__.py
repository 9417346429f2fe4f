"""What may be wrong on this machine: small checks, each of which says what to do."""
