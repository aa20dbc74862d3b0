"""Harmless rows from a pretrained chat model: requests that it writes itself, and its answers to some.

Given the chat template up to the beginning of the user's turn, a chat model continues with a plausible user request
(Magpie, arXiv 2406.08464). Each batch starts from one of `OPENINGS`, because most requests would begin alike otherwise.
Such requests are rarely harmful; those with a word of the lexicon of harm are dropped.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from guardreasoner_vl.errors import DataError, InputError
from guardreasoner_vl.storage.atomic import write_json, write_whole
from guardreasoner_vl.storage.jsonl_log import Format, JsonlLog
from guardreasoner_vl.storage.lock import locked_folder
from guardreasoner_vl.storage.resume import check_inputs
from guardreasoner_vl.teachers.lexicon import find_evidence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guardreasoner_vl.training.pretrained_base import LanguageModel

SOURCE = "base_requests"
ROWS, BATCHES, REPORT = "train.jsonl", "batches.jsonl", "report.json"
OPENINGS = (
    *(
        "How do I",
        "How can I",
        "How does",
        "What",
        "What is",
        "Why",
        "Why do",
        "Write",
        "I",
        "I need",
        "My",
        "Where can I",
    ),
    *(
        "Can you",
        "Is it",
        "Which",
        "When",
        "Who",
        "Explain",
        "Give me",
        "Help me",
        "Tell me",
        "Should I",
        "Create",
        "Please",
    ),
    *("The", "If", "Do", "Make", "Describe", "Suggest", "I am", "We", "Could you", "Translate", "Summarize", "List"),
)
_PLACE = "\x00"
_MAX_REQUEST, _MAX_ANSWER = 40, 64
_WORDS = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?:\n](?=\s|$)")


@dataclass(frozen=True)
class RequestSettings:
    """Settings: rows wanted, seed, share of rows with an answer, requests of a batch, and sampling of tokens."""

    count: int
    seed: int = 0
    answered: float = 0.25
    batch: int = 160
    temperature: float = 1.0
    top_p: float = 0.98


def run(
    model: LanguageModel,
    name: str,
    settings: RequestSettings,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write the first `count` rows to `out/train.jsonl`; batches are saved as they come, so a stopped run resumes.

    The same model (its `name` is recorded), settings and machine give the same rows. Returns the number of requests
    kept, and of those dropped by reason. Raises `InputError` for invalid settings, and `DataError` if the run in `out`
    began with other settings, another process works there, or the model writes no new requests any more.
    """
    if not 0 <= settings.answered <= 1 or settings.count < 1 or settings.batch < 1:
        raise InputError(
            f"count {settings.count}, batch {settings.batch}, answered {settings.answered:g}: give a count and a batch "
            "of at least 1, and a share of answered requests from 0 to 1"
        )
    with locked_folder(out, "write-requests"):
        check_inputs(out / "settings.json", "written requests", {"model": name, **asdict(settings)}, free=("count",))
        form = Format(json.loads, "a batch of requests", "remove the file to begin again")
        with JsonlLog(out / BATCHES, form, "write-requests") as log:
            batches = [batch for _, batch in log.rows()]
            keys = {_key(row["prompt"]) for batch in batches for row in batch["rows"]}
            while (written := sum(len(batch["rows"]) for batch in batches)) < settings.count:
                rows, dropped = _request_batch(model, settings, len(batches), keys)
                batches.append({"rows": rows, "dropped": dropped})
                log.append([json.dumps(batches[-1], ensure_ascii=False).encode() + b"\n"])
                if len(batches) >= len(OPENINGS) and not any(batch["rows"] for batch in batches[-len(OPENINGS) :]):
                    break
                if progress:
                    progress(min(written + len(rows), settings.count), settings.count)
        kept = [row for batch in batches for row in batch["rows"]][: settings.count]
        write_whole(out / ROWS, (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in kept))
        counts = {"kept": len(kept), **sum((Counter[str](batch["dropped"]) for batch in batches), Counter[str]())}
        write_json(out / REPORT, counts)
    if len(kept) < settings.count:
        raise DataError(
            f"{out}: {len(kept):,} requests, and no new one in {len(OPENINGS)} batches: give a --count of at most that"
        )
    return counts


def _request_batch(
    model: LanguageModel, settings: RequestSettings, number: int, keys: set[str]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows of one batch, and the number of dropped requests by reason; adds the new requests to `keys`."""
    torch.manual_seed(settings.seed * 1_000_003 + number)
    opening = OPENINGS[number % len(OPENINGS)]
    head = model.texts.apply_chat_template([{"role": "user", "content": _PLACE}], tokenize=False).split(_PLACE)[0]
    ends = sampled(model, [head + opening] * settings.batch, _MAX_REQUEST, settings)
    kept: list[str] = []
    dropped: Counter[str] = Counter()
    for text, ended in ends:
        request = f"{opening}{text}".strip()
        reason = _fault(request, ended) or ("repeated" if _key(request) in keys else None)
        if reason:
            dropped[reason] += 1
        else:
            keys.add(_key(request))
            kept.append(request)
    to_answer = kept[: round(len(kept) * settings.answered)]
    answers = _write_answers(model, to_answer, settings)
    rows = [
        {
            "id": f"{SOURCE}-{settings.seed}-{number:05d}-{place:03d}",
            "source": SOURCE,
            "modality": "text",
            "prompt": request,
            "response": answer,
            "request_label": "unharmful",
            "response_label": "unharmful" if answer else None,
            "meta": {"by": "provenance", "kind": "written by a language model"},
        }
        for place, (request, answer) in enumerate(
            zip(kept, answers + [None] * (len(kept) - len(to_answer)), strict=True)
        )
    ]
    return rows, dropped


def _fault(request: str, ended: bool) -> str | None:
    """Why a request is dropped, None if it is kept."""
    if not ended:
        return "not ended"
    if not 3 <= len(_WORDS.findall(request)) <= 60 or not request.isprintable():
        return "no sentence"
    return "alarming word" if find_evidence(request) else None


def _write_answers(model: LanguageModel, requests: Sequence[str], settings: RequestSettings) -> list[str | None]:
    """Answers cut after their last whole sentence; None if there is none, or it has a word of the lexicon of harm."""
    if not requests:
        return []
    heads = [
        model.texts.apply_chat_template(
            [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
        )
        for request in requests
    ]
    answers: list[str | None] = []
    for text, ended in sampled(model, heads, _MAX_ANSWER, settings):
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        whole = text.strip() if ended else text[: ends[-1] if ends else 0].strip()
        answers.append(whole if len(_WORDS.findall(whole)) >= 2 and not find_evidence(whole) else None)
    return answers


@torch.inference_mode()
def sampled(
    model: LanguageModel, heads: Sequence[str], new_tokens: int, settings: RequestSettings
) -> list[tuple[str, bool]]:
    """The model's continuation of each head, and whether it ended its turn."""
    tokenizer = model.tokenizer
    end = pad = model.texts.eos_token_id
    encoded = [tokenizer.encode(head, add_special_tokens=False).ids for head in heads]
    longest = max(map(len, encoded))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded])
    output = model.network.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
        eos_token_id=end,
        pad_token_id=pad,
    )
    results = []
    for row in output[:, longest:].tolist():
        ended = end in row
        tokens = row[: row.index(end)] if ended else row
        results.append((tokenizer.decode(tokens, skip_special_tokens=True), ended))
    return results


def _key(request: str) -> str:
    return " ".join(_WORDS.findall(request.casefold()))
