"""From the specification graph to fxquant:: operators.

``FUSIONS`` has one entry a kind of candidate other than linear (``sites.KINDS``); a kind without one stays float.
"""

from fxquant.passes.fuse import attention
from fxquant.passes.fuse.fusion import Fusion

FUSIONS: dict[str, Fusion] = {"attention": attention.FUSION}
