"""What an entry of a source must look like, and the check of it."""
