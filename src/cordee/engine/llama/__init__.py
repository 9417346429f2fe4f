"""Stages on libllama."""
