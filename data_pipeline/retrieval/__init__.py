"""Tier C's data: chunks of the training text as vectors, and which of them each chunk of a sample may read."""
