"""Generation: scheduler, token log, sampling, stop strings, templates. No socket, clock or thread."""
