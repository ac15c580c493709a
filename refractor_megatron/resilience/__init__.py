"""Signals and the locks that keep two runs out of one folder."""
