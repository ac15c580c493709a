"""The model in plain torch and transformers: parity oracle, export format, decoder."""
