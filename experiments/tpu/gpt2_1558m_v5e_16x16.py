"""GPT-2 1558M on v5e:16x16: the run of experiments/gpt2_1558m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_1558m_v5e_16x16.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v5e:16x16 (v5litepod-256), mesh data 16 x fsdp 16: 5.53 of 15.75 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         296.4 ms a step, 211.3 at least: 1,768,636 tokens/s, MFU 36.1%
         19,073 steps in 1h34m, 402 chip-hours, 482 USD at 1.20
Why      FSDP goes along one side of the torus, which is a ring; over all 256 chips it cannot, 1600 is no multiple. remat full is 5 % slower
"""

from experiments.gpt2_1558m import CONFIG as GPT2
from mlm_jax.config import override

CONFIG = override(
    GPT2,
    {
        "mesh.fsdp": 16,
        "model.remat": "dots",
    },
)
