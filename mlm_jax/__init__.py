"""mlm_jax: raw text to a trained, evaluated, talking GPT-2 and back to the Hugging Face format, in JAX and Flax."""
