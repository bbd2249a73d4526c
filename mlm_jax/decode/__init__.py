"""Text generation: `text` is what people call; `loop`, `beam` and `speculative` choose tokens on the device; `chat` is a conversation."""
