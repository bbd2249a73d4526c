"""Do attention and MLP need to run in sequence? Here both read the same normed input and share one addition to the residual stream.

Run      mlm-jax run experiments/parallel_block.py
Cost     that of experiments/tiny.py, less one norm in each block
Expect   the validation loss of experiments/tiny.py, give or take what another seed does: PaLM saw no loss at 62B, a small one at 8B
Sources  Wang & Komatsuzaki 2021, GPT-J-6B (one norm for both); Chowdhery et al. 2022, PaLM, section 2 (parallel layers)
"""

from functools import partial

from experiments.tiny import CONFIG as BASELINE
from mlm_jax.config import override
from mlm_jax.model import gpt2
from mlm_jax.sharding import constrain


class ParallelBlock(gpt2.Block):
    def __call__(self, x_BTD, context):
        h_BTD = self.norm_1(x_BTD)
        return constrain(x_BTD + self.attention(h_BTD, context) + self.mlp(h_BTD), "BTD")


CONFIG = override(BASELINE, {"name": "parallel_block"})
MODEL = partial(gpt2.GPT2, block=ParallelBlock)
