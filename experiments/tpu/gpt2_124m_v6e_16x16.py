"""GPT-2 124M on v6e:16x16: the run of experiments/gpt2_124m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_124m_v6e_16x16.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v6e:16x16 (v6e-256), mesh data 8 x fsdp 32: 1.19 of 31.25 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         15.6 ms a step, 9.6 at least: 33,513,878 tokens/s, MFU 12.3%
         19,073 steps in 4m58s, 21 chip-hours, 57 USD at 2.70
Why      FSDP goes over 32 chips, two rows of the torus; over 16 or 64 a step is 5 % slower. 2 rows of the batch are too little for so quick a
         chip: heads of 64 fill a quarter of its matrix units, and exchanges take a third of the time
"""

from experiments.gpt2_124m import CONFIG as GPT2
from mlm_jax.config import override

CONFIG = override(
    GPT2,
    {
        "mesh.fsdp": 32,
        "model.remat": "dots",
    },
)
