"""From an exported folder to text: prompts, sampling, batched decoding with a cache, and ``refractor generate``."""
