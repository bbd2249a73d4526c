"""GPT-2 1558M on v6e:16x16: the run of experiments/gpt2_1558m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_1558m_v6e_16x16.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v6e:16x16 (v6e-256), mesh data 16 x fsdp 16: 5.76 of 31.25 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         140.1 ms a step, 76.3 at least: 3,741,634 tokens/s, MFU 16.4%
         19,073 steps in 44m33s, 190 chip-hours, 513 USD at 2.70
Why      as on v5e:16x16. Exchanges take more than a third of the time: 2 rows a chip are little for it
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
