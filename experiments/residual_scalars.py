"""Should every layer see the embedding again? Before each block the residual stream is mixed with it by two learned numbers.

Run      mlm-jax run experiments/residual_scalars.py
Cost     that of experiments/tiny.py, and two numbers a layer
Expect   a validation loss at or a little below that of experiments/tiny.py
Sources  KellerJordan/modded-nanogpt, records/110624_ShortcutsTweaks (x = l0 x + l1 x0, from 1 and 0, where the model is the baseline); there
         x0 is normed and the two learn at a rate of their own, here neither
"""

from functools import partial

import flax.linen as nn

from experiments.tiny import CONFIG as BASELINE
from mlm_jax.config import override
from mlm_jax.model import gpt2


class ScaledBlock(gpt2.Block):
    def setup(self):
        super().setup()
        self.scale_x_ = self.param("scale_x_", nn.initializers.ones, ())  # no letter: one number a layer
        self.scale_x0_ = self.param("scale_x0_", nn.initializers.zeros, ())

    def __call__(self, x_BTD, context):
        mixed_BTD = self.scale_x_ * x_BTD + self.scale_x0_ * context.embedded_BTD
        return super().__call__(mixed_BTD.astype(x_BTD.dtype), context)


CONFIG = override(BASELINE, {"name": "residual_scalars"})
MODEL = partial(gpt2.GPT2, block=ScaledBlock)
