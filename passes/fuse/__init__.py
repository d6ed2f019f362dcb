"""From the specification graph to fxquant:: operators.

``FUSIONS`` has one entry a kind of candidate other than linear (``sites.KINDS``); a kind without one stays float.
"""

from fxquant.passes.fuse import attention, gelu, sigmoid_attention, softmax
from fxquant.passes.fuse.fusion import Fusion

FUSIONS: dict[str, Fusion] = {
    "attention": attention.FUSION,
    "gelu": gelu.FUSION,
    "sigmoid_attention": sigmoid_attention.FUSION,
    "softmax": softmax.FUSION,
}
