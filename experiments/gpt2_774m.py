"""GPT-2 774M, the large one, on the 10 billion tokens of experiments/gpt2_124m.py.

Run      mlm-jax run experiments/gpt2_774m.py --set data.source=FOLDER_OF_TEXT --set mesh.fsdp=8
Cost     5.2e19 FLOPs by the formula in metrics.py: 18 hours on a TPU v5e-8 at half of its peak; 11.5 GiB of parameters, gradients and
         moments, hence FSDP. Not run by this project yet
Expect   a validation loss below that of experiments/gpt2_124m.py on the same tokens; how far below is not known here
Sources  shape: Radford et al. 2019, table 2, and openai-community/gpt2-large; learning rate: Brown et al. 2020, table 2.1, GPT-3 Large;
         all else: experiments/gpt2_124m.py
"""

from experiments.gpt2_124m import CONFIG as GPT2_124M
from mlm_jax.config import override

CONFIG = override(
    GPT2_124M,
    {
        "name": "gpt2_774m",
        "model.n_layers": 36,
        "model.n_heads": 20,
        "model.d_model": 1280,
        "model.d_ff": 5120,
        "optim.peak_lr": 2.5e-4,
    },
)
