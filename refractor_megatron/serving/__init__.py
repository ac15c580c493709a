"""Serving engines of others: what they need to run our exports."""
