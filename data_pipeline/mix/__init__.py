"""How often each domain is drawn, and which sample is whose."""
