"""Training that wins back what a ternary model lost when it was compressed: `cordee distill`."""
