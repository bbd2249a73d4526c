"""GPT-2 124M on v5p:4x4x4: the run of experiments/gpt2_124m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_124m_v5p_4x4x4.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v5p:4x4x4 (v5p-128), mesh data 64: 5.88 of 95.74 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         51.1 ms a step, 46.2 at least: 10,256,030 tokens/s, MFU 30.0%
         19,073 steps in 16m15s, 17 chip-hours, 73 USD at 4.20
Why      so small a model is whole on every device; FSDP over 4 is 5 % slower
"""

from experiments.gpt2_124m import CONFIG as GPT2
from mlm_jax.config import override

CONFIG = override(
    GPT2,
    {
        "model.remat": "dots",
    },
)
