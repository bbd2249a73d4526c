"""GPT-2 1558M, the XL one, on the 10 billion tokens of experiments/gpt2_124m.py.

Run      mlm-jax run experiments/gpt2_1558m.py --set data.source=FOLDER_OF_TEXT --set mesh.fsdp=8
Cost     1.0e20 FLOPs by the formula in metrics.py: 36 hours on a TPU v5e-8 at half of its peak; 23.2 GiB of parameters, gradients and
         moments, hence FSDP. Not run by this project yet
Expect   a validation loss below that of experiments/gpt2_124m.py on the same tokens; how far below is not known here
Sources  shape: Radford et al. 2019, table 2, and openai-community/gpt2-xl; learning rate: Brown et al. 2020, table 2.1, GPT-3 XL;
         all else: experiments/gpt2_124m.py
"""

from experiments.gpt2_124m import CONFIG as GPT2_124M
from mlm_jax.config import override

CONFIG = override(
    GPT2_124M,
    {
        "name": "gpt2_1558m",
        "model.n_layers": 48,
        "model.n_heads": 25,
        "model.d_model": 1600,
        "model.d_ff": 6400,
        "optim.peak_lr": 2e-4,
    },
)
