"""Model files: the store, GGUF headers, slices, cards and the fit estimate. It runs no model."""
