"""GPT-2 124M on v5e:16x16: the run of experiments/gpt2_124m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_124m_v5e_16x16.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v5e:16x16 (v5litepod-256), mesh data 16 x fsdp 16: 1.23 of 15.75 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         31.9 ms a step, 24.2 at least: 16,433,438 tokens/s, MFU 28.0%
         19,073 steps in 10m08s, 43 chip-hours, 52 USD at 1.20
Why      FSDP goes along one side of the torus, which is a ring. Keeping all, remat none, is a sixth slower: it is written and read again
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
