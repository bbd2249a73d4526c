"""The shape of DistilGPT2, half the layers of GPT-2 124M, trained from scratch on the same 10 billion tokens and not distilled.

Run      mlm-jax run experiments/distilgpt2.py --set data.source=FOLDER_OF_TEXT
Cost     5.5e18 FLOPs by the formula in metrics.py: 2 hours on a TPU v5e-8 at half of its peak. Not run by this project yet
Expect   a validation loss above that of experiments/gpt2_124m.py on the same tokens; how far above is not known here
Sources  shape: Sanh et al. 2019, section 2 (every other layer left out), and distilbert/distilgpt2, config.json; learning rate and all else:
         experiments/gpt2_124m.py
"""

from experiments.gpt2_124m import CONFIG as GPT2_124M
from mlm_jax.config import override

CONFIG = override(
    GPT2_124M,
    {
        "name": "distilgpt2",
        "model.n_layers": 6,
    },
)
