"""What a run says about itself: metric registry, sinks, the console line, and counts of floating-point work."""
