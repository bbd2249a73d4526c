"""GPT-2 124M on 10 billion tokens of web text: the baseline that every ablation differs from.

Run      mlm-jax run experiments/gpt2_124m.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Cost     8.6e18 FLOPs by the formula in metrics.py: 3 hours on a TPU v5e-8 at half of its peak. Not run by this project yet
Expect   validation loss 3.27 nats/token, what llm.c publishes for 10B tokens of FineWeb
Sources  shapes: Radford et al. 2019, table 2; learning rate: Brown et al. 2020, table 2.1; warm-up, tokens per step, weight decay and
         betas: karpathy/llm.c, scripts/run_gpt2_124M.sh and train_gpt2.cu; steps: 10e9 tokens / 524,288 a step
"""

from mlm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig

CONFIG = Config(
    name="gpt2_124m",
    model=ModelConfig(n_layers=12, n_heads=12, d_model=768, d_ff=3072, context_len=1024, vocab_multiple=128, compute_dtype="bfloat16"),
    data=DataConfig(source="data/web10b", tokenizer="gpt2", val_fraction=0.001, tokens="data/web10b-gpt2"),
    optim=OptimConfig(peak_lr=6e-4, end_lr=0.0, warmup_steps=700, weight_decay=0.1, b1=0.9, b2=0.95, clip_norm=1.0),
    train=TrainConfig(steps=19_073, batch_size=512, eval_every=250, eval_windows=512, save_every=1_000),
    mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
)
