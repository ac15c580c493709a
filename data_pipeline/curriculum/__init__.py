"""Stages of rising sequence length, and which documents each trains on."""
