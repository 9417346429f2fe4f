"""From ternary models in other formats to our file, and from there to an old machine. It runs no model."""
