"""The optimizer: schedule, decay mask, and the optax chain."""

import optax

from mlm_jax.config import OptimConfig
from mlm_jax.sharding import is_decayed


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate: a linear rise to `peak_lr` over `warmup_steps`, then half a cosine down to `end_lr` at `steps`.

    Update number n (from 0) uses the value at n + 1, so that the first update is not idle and the last one reaches `end_lr`.

    Source: Loshchilov & Hutter 2017, equation 5; Radford et al. 2018, section 4.1 (linear warm-up).
    """
    decay = optax.cosine_decay_schedule(
        config.peak_lr, max(steps - config.warmup_steps, 1), alpha=config.end_lr / config.peak_lr if config.peak_lr else 0.0
    )
    warmup = optax.linear_schedule(0.0, config.peak_lr, max(config.warmup_steps, 1))
    joined = optax.join_schedules([warmup, decay], [config.warmup_steps])
    return lambda count: joined(count + 1)


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decay on weights alone.

    Source: Loshchilov & Hutter 2019, algorithm 2; decoupled decay is scaled by the learning rate, as in PyTorch.
    """
    adamw = optax.adamw(schedule(config, steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=is_decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
