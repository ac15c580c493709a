"""Which documents are fit to train on: signals, decisions by thresholds over them, an audit."""
