"""Receipts of a build: ledgers that balance, a Merkle tree over the files, verification, Croissant metadata."""
