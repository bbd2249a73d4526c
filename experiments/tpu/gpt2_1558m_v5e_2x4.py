"""GPT-2 1558M on v5e:2x4: the run of experiments/gpt2_1558m.py with what suits this slice.

Run      mlm-jax run experiments/tpu/gpt2_1558m_v5e_2x4.py --set data.source=FOLDER_OF_TEXT   (on a pod: tpu_scripts/run_on_pod.sh)
Plan     v5e:2x4 (v5litepod-8), mesh fsdp 8: 11.79 of 15.75 GiB a device; jax 0.10.2, libtpu 0.0.42.1
         7893.0 ms a step, 6828.5 at least: 66,424 tokens/s, MFU 43.4%
         19,073 steps in 41h49m, 335 chip-hours, 401 USD at 1.20
Why      a batch goes through in sixteen parts of 4 rows a device, for each of which all weights are gathered; parts of 2 rows are 8 %
         slower, and computing everything again, remat full, 4 %
"""

from experiments.gpt2_1558m import CONFIG as GPT2
from mlm_jax.config import override

CONFIG = override(
    GPT2,
    {
        "mesh.fsdp": 8,
        "model.remat": "dots",
        "train.micro_batches": 16,
        "train.loss_chunks": 4,
    },
)
