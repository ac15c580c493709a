"""Documents to token ids with records."""
