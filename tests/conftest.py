"""Every test runs on eight simulated CPU devices and without a network."""

import os

# Set before anything imports jax or transformers; child processes inherit these, and see one device.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads outlive a fork, of which it warns

import jax

jax.config.update("jax_num_cpu_devices", 8)
