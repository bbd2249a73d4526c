"""nanoGPT's CPU setting: a character-level GPT on the works of Shakespeare.

Run      mlm-jax run experiments/shakespeare_char.py --set data.source=input.txt
Cost     64 s on two CPU cores, from start to report; nanoGPT takes 92 s there
Expect   1.90 nats per character over the whole last 10 % of the text (seeds 0, 1, 2: 1.892, 1.911, 1.908); nanoGPT publishes 1.88
Sources  setting: karpathy/nanoGPT, README.md and config/train_shakespeare_char.py; text: its data/shakespeare_char/input.txt
"""

from mlm_jax.config import Config, DataConfig, ModelConfig, OptimConfig, SampleConfig, TrainConfig

CONFIG = Config(
    name="shakespeare_char",
    model=ModelConfig(n_layers=4, n_heads=4, d_model=128, d_ff=512, context_len=64, dropout=0.0, unroll_layers=True),
    data=DataConfig(source="input.txt", tokenizer="char", val_fraction=0.1),
    optim=OptimConfig(peak_lr=1e-3, end_lr=1e-4, warmup_steps=100, weight_decay=0.1, b1=0.9, b2=0.99),
    train=TrainConfig(steps=2000, batch_size=12, eval_every=250, eval_windows=240, save_every=0),
    sample=SampleConfig(num=1, max_tokens=60, prompt="\n"),
)
