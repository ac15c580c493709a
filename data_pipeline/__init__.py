"""Documents to training samples: sources, selection, tokenise, pack, stream. Imports neither torch nor megatron."""
