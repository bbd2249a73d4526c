"""GPT-2 355M, the medium one, on the 10 billion tokens of experiments/gpt2_124m.py.

Run      mlm-jax run experiments/gpt2_355m.py --set data.source=FOLDER_OF_TEXT
Cost     2.4e19 FLOPs by the formula in metrics.py: 9 hours on a TPU v5e-8 at half of its peak. Not run by this project yet
Expect   a validation loss below that of experiments/gpt2_124m.py on the same tokens; how far below is not known here
Sources  shape: Radford et al. 2019, table 2, and openai-community/gpt2-medium; learning rate: Brown et al. 2020, table 2.1, GPT-3 Medium;
         all else: experiments/gpt2_124m.py
"""

from experiments.gpt2_124m import CONFIG as GPT2_124M
from mlm_jax.config import override

CONFIG = override(
    GPT2_124M,
    {
        "name": "gpt2_355m",
        "model.n_layers": 24,
        "model.n_heads": 16,
        "model.d_model": 1024,
        "model.d_ff": 4096,
        "optim.peak_lr": 3e-4,
    },
)
