"""Where metrics go: JSON lines always; TensorBoard and Weights & Biases (offline) on request."""
