"""Engines: a `Stage` takes rows and gives rows (or logits). It knows no network and no scheduler."""
