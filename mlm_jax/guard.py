"""What keeps a bad batch from spoiling a run: a step that is not finite, or far outside of the last ones, changes nothing."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mlm_jax import objectives
from mlm_jax.model import gpt2

WINDOW = 128  # steps that a new one is compared with, and before which none counts as a spike: allenai/OLMo-core, SkipStepOptimizer


class Recent(NamedTuple):
    """The last steps that were taken, and how many were not."""

    figures: dict[str, Float[Array, "W"]]  # loss_W and grad_norm_W, the newest first; NaN where there was no step yet
    skipped: Int[Array, ""]  # in all
    in_row: Int[Array, ""]  # up to this step


def start() -> Recent:
    """Before the first step."""
    empty = jnp.full(WINDOW, jnp.nan)
    return Recent({"loss_W": empty, "grad_norm_W": empty}, jnp.int32(0), jnp.int32(0))


def is_good(recent: Recent, loss: Float[Array, ""], grad_norm: Float[Array, ""], sigmas: float) -> Bool[Array, ""]:
    """Both are finite and, once there are enough steps to compare with, loss and log(grad_norm) at most `sigmas` deviations above their mean.

    `sigmas` = 0 asks for finite figures alone. Source: allenai/OLMo-core, src/olmo_core/optim/skip_step_optimizer.py, but for the logarithm: norms
    of the gradient of small batches have a long tail, and `experiments/shakespeare_char.py` had 5 of 2,000 innocent steps beyond 6 deviations.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if sigmas:
        for figure, past_W in ((loss, recent.figures["loss_W"]), (jnp.log(grad_norm), jnp.log(recent.figures["grad_norm_W"]))):
            good &= ~(figure > past_W.mean() + sigmas * past_W.std())  # False of NaN: too few steps
    return good


def remember(recent: Recent, good: Bool[Array, ""], loss: Float[Array, ""], grad_norm: Float[Array, ""]) -> Recent:
    """With a step more. One without a gradient is nothing to compare with: its logarithm would make every deviation infinite."""
    kept = good & (grad_norm > 0)

    def push(past_W: Array, figure: Array) -> Array:
        return jnp.where(kept, jnp.concatenate([figure[None], past_W[:-1]]), past_W)

    figures = {"loss_W": push(recent.figures["loss_W"], loss), "grad_norm_W": push(recent.figures["grad_norm_W"], grad_norm)}
    return Recent(figures, recent.skipped + ~good, jnp.where(good, 0, recent.in_row + 1))


def first_not_finite(model: gpt2.Model, params: Any, tokens_BW: Int[Any, "B W"], documents: objectives.Documents | None = None) -> str:
    """The first array that is not finite, in words: a parameter, then the output of a part of the model in the order in which they are computed,
    then the loss, then a gradient in the order of the backward pass; empty where all are finite. `documents` is what the model is told of documents.

    It computes layer by layer and without dropout, outside of the compiled step.
    """

    def name(path: tuple) -> str:
        return "/".join(str(getattr(key, "key", key)) for key in path if str(getattr(key, "key", "")) != "__call__" and hasattr(key, "key"))

    examples, unstacked = objectives.causal(jnp.asarray(tokens_BW)), model.clone(stacked=False)
    told: dict[str, Any] = documents.call(examples.inputs_BT) if documents else {}
    c: Any = unstacked.config  # pyright: ignore[reportAttributeAccessIssue]  # a model has one
    looked_at: list[str] = []

    @jax.jit  # one program: on a mesh of CPU devices a thousand small ones with exchanges may wait for each other for ever
    def finite(params: Any) -> list[Array]:
        """Whether each of what is `looked_at` is finite."""
        found: list[Array] = []

        def look(what: str, x: Array) -> None:
            looked_at.append(what)
            found.append(jnp.isfinite(x).all())

        flat = gpt2.unstack(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(flat):
            look(f"the parameter {name(path)}", leaf)
        called: list[tuple[str, Any]] = []

        def note(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = next_function(*args, **kwargs)
            if context.method_name == "__call__" and isinstance(out, jax.Array):
                called.append(("/".join(context.module.path) or "logits", out))
            return out

        with gpt2.intercept(note):
            logits_BTV: Any = unstacked.apply({"params": flat}, examples.inputs_BT, **told)
        for part, out in called:
            look(f"the output of {part}", logits_BTV[..., : c.vocab_size] if part == "logits" else out)  # the padding of the vocabulary is -inf
        look("the loss", objectives.cross_entropy(logits_BTV, examples.targets_BT))

        def loss_of(flat: Any) -> Array:
            logits_BTV: Any = unstacked.apply({"params": flat}, examples.inputs_BT, **told)
            return objectives.cross_entropy(logits_BTV, examples.targets_BT).mean()

        gradients = [(name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(jax.grad(loss_of)(flat))]
        called_at = {part: i for i, (part, _) in enumerate(called)}
        gradients.sort(key=lambda named: -called_at.get(named[0].rpartition("/")[0], -1))  # the backward pass meets the last call first
        for where, gradient in gradients:
            look(f"the gradient of {where}", gradient)
        return found

    good = jax.device_get(finite(params))
    return next((what for what, is_finite in zip(looked_at, good, strict=True) if not is_finite), "")
