"""One LayerPlan for every layer, and its assembly into a Megatron model."""
