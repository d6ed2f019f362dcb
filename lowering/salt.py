"""What Inductor's and AOTAutograd's caches must also know: the digest of our sources and the instruction sets.

Without it a changed kernel, rule or lowering would not be noticed and code of another build would be reused. Inductor's own
vectors (``ATEN_CPU_CAPABILITY`` narrows them) are missing in its key too: code written for 8 floats and compiled for 16
writes past the end of its buffers.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

from fxquant._compat import make_salt_pass, user_post_grad_passes, vector_isa


def cache_salt(isa: str, user_patches: dict[str, Any]) -> dict[str, Any]:
    """The Inductor config patches of one compilation: the user's own, with our salt added to the cache keys."""
    return _salted(f"{source_digest()}-{isa}-{vector_isa()}", user_patches)


def float_salt(user_patches: dict[str, Any]) -> dict[str, Any]:
    """The same for a graph that stays float: nothing in it is ours, but its key must know Inductor's vectors all the same."""
    return _salted(vector_isa(), user_patches)


def _salted(value: str, user_patches: dict[str, Any]) -> dict[str, Any]:
    return {**user_patches, "post_grad_custom_pre_pass": [*user_post_grad_passes(user_patches), make_salt_pass(value)]}


@functools.cache
def source_digest() -> str:
    """SHA-256 over every Python and C++ source of fxquant, by name and content."""
    import fxquant
    import fxquant.lowering
    import fxquant.passes

    digest = hashlib.sha256()
    for package in (fxquant, fxquant.lowering, fxquant.passes):
        root = Path(str(package.__file__)).resolve().parent
        for path in sorted(p for suffix in ("*.py", "*.h", "*.cpp") for p in root.rglob(suffix)):
            digest.update(f"{root.name}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
