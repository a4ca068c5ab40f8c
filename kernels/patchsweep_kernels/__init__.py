"""Operations that take time beside the model's own layers.

Each has one name and one signature, and a plain PyTorch implementation that runs on every device.
"""

from patchsweep_kernels.metric_head import MetricHead, Reference, metric_head
from patchsweep_kernels.packed_attention import Rows, attention_rows, packed_attention

__all__ = [
    "MetricHead",
    "Reference",
    "Rows",
    "attention_rows",
    "metric_head",
    "packed_attention",
]
