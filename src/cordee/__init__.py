"""Cordée: open language models on the machines you already have, alone or roped together."""

__version__ = "0.2.0"
