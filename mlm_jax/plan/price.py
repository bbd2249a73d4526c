"""Days and money for so many steps."""

import math
from typing import NamedTuple

from mlm_jax.config import InputError
from mlm_jax.plan.topology import Topology

HOUR_S, DAY_S = 3600, 86_400


class Budget(NamedTuple):
    """What `steps` steps of `step_s` seconds take on `n_chips` chips."""

    step_s: float
    steps: float  # of whole batches
    n_chips: int
    usd_per_chip_hour: float

    @property
    def days(self) -> float:
        return self.step_s * self.steps / DAY_S

    @property
    def chip_hours(self) -> float:
        return self.step_s * self.steps / HOUR_S * self.n_chips

    @property
    def usd(self) -> float:
        return self.chip_hours * self.usd_per_chip_hour


def budget(topology: Topology, step_s: float, steps: float, usd_per_chip_hour: float | None = None) -> Budget:
    """The budget on all chips of `topology`, by default at their list price (chips.PRICES_OF says of when).

    Raises:
      InputError: the price is negative or no number.
    """
    price = topology.chip.usd_per_hour if usd_per_chip_hour is None else usd_per_chip_hour
    if not 0 <= price < math.inf:
        raise InputError(
            "--price", price, "no price of a chip-hour in USD", f"Give 0 or more, or leave --price out for {topology.chip.usd_per_hour:.2f}"
        )
    return Budget(step_s, steps, topology.n_chips, price)
