"""Baseline: hashed word n-grams + logistic regression on the text alone. Every guard has to beat it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from guardreasoner_vl.errors import DataError, MissingExtraError
from guardreasoner_vl.types import Label, Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.evaluation.results import Baseline
    from guardreasoner_vl.types import Sample


HASHED_NGRAMS = "hashed n-grams"
"""The baseline's name in results and reports."""


def baseline_text(sample: Sample, target: Target) -> str:
    """The text that the baseline reads: the prompt, and for a response also the answer. Images are ignored."""
    return sample.prompt if target == "request" else f"{sample.prompt}\n{sample.response or ''}"


@dataclass
class HashedNgramBaseline:
    """Word uni- and bigrams hashed to 2^18 counts, with L2-regularised logistic regression."""

    vectorizer: Any
    classifier: Any
    target: Target

    @classmethod
    def fit(cls, samples: Iterable[Sample], target: Target) -> HashedNgramBaseline:
        """Train on the rows with a known `target` label. Raises `DataError` without both classes."""
        try:
            from sklearn.feature_extraction.text import HashingVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise MissingExtraError("scikit-learn", "train") from error
        rows = [(baseline_text(row, target), getattr(row, f"{target}_label")) for row in samples]
        texts = [text for text, label in rows if label]
        labels = [label == "harmful" for _, label in rows if label]
        if len(set(labels)) < 2:
            raise DataError(f"the training rows do not have both {target} classes; add rows of the missing one")
        vectorizer = HashingVectorizer(n_features=2**18, ngram_range=(1, 2), alternate_sign=False)
        classifier = LogisticRegression(C=10, max_iter=300).fit(vectorizer.transform(texts), labels)
        return cls(vectorizer, classifier, target)

    def probabilities(self, samples: Sequence[Sample]) -> list[float]:
        """P(harmful) for each row."""
        if not samples:
            return []
        features = self.vectorizer.transform([baseline_text(row, self.target) for row in samples])
        return [float(row[1]) for row in self.classifier.predict_proba(features)]


def hashed_ngrams(train: Sequence[Sample], benchmarks: Iterable[LoadedBenchmark]) -> Baseline:
    """Train on `train`, and predict the labels of all labelled benchmark rows.

    Where `train` has one class only, that class is predicted; where it has no label, unharmful.
    """
    labels: dict[tuple[str, str, Target], Label] = {}
    loaded = list(benchmarks)
    for target in get_args(Target):
        classes = {getattr(row, f"{target}_label") for row in train} - {None}
        model = HashedNgramBaseline.fit(train, target) if len(classes) == 2 else None
        for benchmark in loaded:
            rows = [row for row in benchmark.samples if getattr(row, f"{target}_label") is not None]
            chances = model.probabilities(rows) if model else [float("harmful" in classes)] * len(rows)
            for row, chance in zip(rows, chances, strict=True):
                key = (benchmark.benchmark.name, row.id, target)
                labels[key] = Label.HARMFUL if chance > 0.5 else Label.UNHARMFUL
    return lambda row, target: labels[row.benchmark, row.id, target]
