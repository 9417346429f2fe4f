"""From other people's ternary models to our file, and from there to an old machine. It runs no model."""
