"""What a person reads about a dataset: one HTML page, and answers on the command line."""
