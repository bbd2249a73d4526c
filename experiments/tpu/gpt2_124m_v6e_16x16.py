"""GPT-2 124M on v6e:16x16: the run of experiments/gpt2_124m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_124m_v6e_16x16.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v6e:16x16 (v6e-256), mesh data 16 x fsdp 16: 1.25 of 31.25 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         16.4 ms a step, 9.8 at least: 31,993,157 tokens/s, MFU 11.7%
         19,073 steps in 5m13s, 22 chip-hours, 60 USD at 2.70
Why      FSDP goes along one side of the torus, which is a ring; without it the step is a sixth slower. 2 rows are too little for so quick a
         chip: heads of 64 fill a quarter of its matrix units, and exchanges take a third of the time
"""

from experiments.gpt2_124m import CONFIG as GPT2
from mlm_jax.config import override

CONFIG = override(
    GPT2,
    {
        "mesh.fsdp": 16,
        "model.remat": "dots",
    },
)
