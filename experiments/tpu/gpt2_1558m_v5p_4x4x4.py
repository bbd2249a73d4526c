"""GPT-2 1558M on v5p:4x4x4: the run of experiments/gpt2_1558m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_1558m_v5p_4x4x4.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v5p:4x4x4 (v5p-128), mesh data 4 x fsdp 16: 15.98 of 95.74 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         476.5 ms a step, 422.0 at least: 1,100,371 tokens/s, MFU 38.5%
         19,073 steps in 2h31m, 162 chip-hours, 679 USD at 4.20
Why      FSDP over 4 is 9 % slower, keeping all, remat none, 16 %. Over all 64 chips a step is estimated 2 % quicker, but gradients are summed
         whole, twice the bytes
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
