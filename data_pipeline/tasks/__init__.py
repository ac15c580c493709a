"""Documents made from the corpus' own text: retrieval among hard negatives, and evidence that lies far back."""
