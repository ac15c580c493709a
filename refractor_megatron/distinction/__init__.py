"""Roles, mask rules and their lowerings to attention."""
