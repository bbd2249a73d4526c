"""Do values gain from the token itself? Every layer has a table of values, one row a token, and mixes it in by two learned numbers.

Run      mlm-jax run experiments/value_embeddings.py
Cost     that of experiments/tiny.py in FLOPs; n_layers more tables of the size of the embedding
Expect   a lower training loss than experiments/tiny.py; on so little text the tables may as well learn it by heart
Sources  KellerJordan/modded-nanogpt: records/120424_ValueEmbed (a table for each layer) and train_gpt.py of 2025 (v = l0 v + l1 ve, there
         from l0 = l1 = 0.5; here from 1 and 0, where the model is the baseline, and with its weight decay)
"""

from functools import partial

import flax.linen as nn

from experiments.tiny import CONFIG as BASELINE
from mlm_jax.config import ModelConfig, override
from mlm_jax.model import gpt2


class ValueEmbedding(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, v_BTKH, tokens_BT):
        c = self.config
        w_value_VKH = self.param("w_value_VKH", gpt2.normal(c.init_std), (c.padded_vocab_size, c.n_keys, c.head_dim))
        scale_v_ = self.param("scale_v_", nn.initializers.ones, ())  # no letter: one number a layer
        scale_ve_ = self.param("scale_ve_", nn.initializers.zeros, ())
        return (scale_v_ * v_BTKH + scale_ve_ * w_value_VKH[tokens_BT]).astype(v_BTKH.dtype)


class ValueAttention(gpt2.Attention):
    def values(self, v_BTKH, context):
        return ValueEmbedding(self.config, name="value")(v_BTKH, context.tokens_BT)  # a part of its own: the others are drawn as ever


class ValueBlock(gpt2.Block):
    def setup(self):
        c = self.config
        self.norm_1, self.attention, self.norm_2, self.mlp = gpt2.Norm(c), ValueAttention(c), gpt2.Norm(c), gpt2.Mlp(c)
        self.dropout = nn.Dropout(c.dropout)


CONFIG = override(BASELINE, {"name": "value_embeddings"})
MODEL = partial(gpt2.GPT2, block=ValueBlock)
