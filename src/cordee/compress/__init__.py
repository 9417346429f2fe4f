"""From an ordinary model to a ternary one without training, and what that costs."""
