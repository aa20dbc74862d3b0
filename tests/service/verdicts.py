"""Verdicts made by hand, without a guard."""

from __future__ import annotations

from guardreasoner_vl.types import Judgement, Label, ModelInfo, Verdict

MODEL = ModelInfo(name="scripted")


def verdict(harmful: bool) -> Verdict:
    return Verdict(
        request=Judgement(label=Label.UNHARMFUL),
        response=Judgement(label=Label.HARMFUL if harmful else Label.UNHARMFUL),
        flagged=harmful,
        action="block" if harmful else "allow",
        mode="slow",
        model=MODEL,
    )
