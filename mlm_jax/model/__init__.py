"""The model: GPT-2 as Flax modules, and its attention."""
