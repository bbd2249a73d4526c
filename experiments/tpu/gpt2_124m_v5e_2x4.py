"""GPT-2 124M on v5e:2x4: the run of experiments/gpt2_124m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_124m_v5e_2x4.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v5e:2x4 (v5litepod-8), mesh fsdp 8: 4.55 of 15.75 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         776.7 ms a step, 684.6 at least: 674,981 tokens/s, MFU 36.8%
         19,073 steps in 4h06m, 33 chip-hours, 40 USD at 1.20
Why      a batch goes through in eight parts of 8 rows a device; what products gave is kept, what is cheap is computed again. Parts of 16 rows
         are a seventh slower, remat attention 6 %, pure data parallelism 9 %
"""

from experiments.gpt2_124m import CONFIG as GPT2
from mlm_jax.config import override

CONFIG = override(
    GPT2,
    {
        "mesh.fsdp": 8,
        "model.remat": "dots",
        "train.micro_batches": 8,
    },
)
