"""GPT-2 1558M on v6e:16x16: the run of experiments/gpt2_1558m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_1558m_v6e_16x16.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v6e:16x16 (v6e-256), mesh data 4 x fsdp 64: 4.89 of 31.25 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         120.7 ms a step, 71.2 at least: 4,345,130 tokens/s, MFU 19.0%
         19,073 steps in 38m21s, 164 chip-hours, 442 USD at 2.70
Why      FSDP goes over 64 chips, four rows of the torus, the most that 1600 is a multiple of; over 32 a step is 5 % slower, over 16 16 %.
         Exchanges take a third of the time: 2 rows a chip are little for it
"""

from experiments.gpt2_1558m import CONFIG as GPT2
from mlm_jax.config import override

CONFIG = override(
    GPT2,
    {
        "mesh.fsdp": 64,
        "model.remat": "dots",
    },
)
