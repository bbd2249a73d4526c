"""Days and money by hand."""

import math

import pytest

from mlm_jax.config import InputError
from mlm_jax.plan.price import budget
from mlm_jax.plan.topology import parse


def test_days_and_money_are_those_of_all_chips():
    # 43,200 steps of 2 s are a day; 2 slices of 64 chips at 4.20 USD for 24 hours.
    plan = budget(parse("v5p-128", slices=2), step_s=2.0, steps=43_200)
    assert (plan.days, plan.chip_hours) == (1, 24 * 128)
    assert plan.usd == pytest.approx(24 * 128 * 4.20)


def test_another_price_takes_the_place_of_the_list():
    topology = parse("v5e:2x4")
    assert budget(topology, 1.0, 3600, 0.5).usd == pytest.approx(8 * 0.5)
    assert budget(topology, 1.0, 3600, 0.0).usd == 0


@pytest.mark.parametrize("price", [-1.0, math.nan, math.inf])
def test_a_price_that_is_none_is_refused(price):
    with pytest.raises(InputError, match=r"^--price = .*Give 0 or more, or leave --price out for 1\.20\.$"):
        budget(parse("v5e:2x4"), 1.0, 1, price)
