"""GPT-2 124M on v5e:16x16: the run of experiments/gpt2_124m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_124m_v5e_16x16.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v5e:16x16 (v5litepod-256), mesh data 8 x fsdp 32: 1.17 of 15.75 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         30.3 ms a step, 23.5 at least: 17,318,301 tokens/s, MFU 29.5%
         19,073 steps in 9m37s, 41 chip-hours, 49 USD at 1.20
Why      found by --search. FSDP goes over 32 chips, two rows of the torus; over 16, one row, a step is 5 % slower. Keeping all, remat none, is
         a sixth slower: it is written and read again
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
