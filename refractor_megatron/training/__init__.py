"""The training loop and everything it resumes."""
