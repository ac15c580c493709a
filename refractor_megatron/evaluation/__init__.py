"""What a model is worth: held-out loss, count-based baselines of the same tokens, and the report of a run."""
