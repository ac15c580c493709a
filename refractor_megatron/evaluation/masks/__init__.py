"""``refractor masks``: what a rule set permits, as a table and as a picture."""
