"""The optimizer: schedule, decay mask, and the optax chain."""

from typing import Any

import jax
import optax

from mlm_jax.config import OptimConfig
from mlm_jax.sharding import is_decayed, is_hidden


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


def optimizer(config: OptimConfig, steps: int, *, width_multiplier: float = 1.0) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with decay on weights alone; muP divides Adam's step of hidden weights by `width_multiplier`.

    Source: Loshchilov & Hutter 2019, algorithm 2; decoupled decay is scaled by the learning rate, as in PyTorch, and in muP is not divided.
    Yang et al. 2022, table 8 (hidden weights; Adam's step of all others keeps its size).
    """

    def divide(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda u, hidden: u / width_multiplier if hidden else u, updates, is_hidden(updates))

    adamw = optax.chain(  # optax.adamw, with muP in its middle
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        *([optax.stateless(divide)] if width_multiplier != 1 else []),
        optax.add_decayed_weights(config.weight_decay, is_decayed),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
