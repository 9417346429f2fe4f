"""Speculation: guesses of the tokens to come, and whether to make them pays. No socket, clock or thread."""
