"""Duplicates: exact, and near by MinHash with every candidate verified."""
