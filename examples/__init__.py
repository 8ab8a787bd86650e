"""Runnable examples, one module each."""
