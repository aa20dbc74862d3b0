"""The known benchmarks, by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.evaluation.benchmarks import images, upstream
from guardreasoner_vl.evaluation.benchmarks.base import Benchmark, FileLayout
from guardreasoner_vl.evaluation.benchmarks.released import released
from guardreasoner_vl.evaluation.published import sizes

if TYPE_CHECKING:
    from guardreasoner_vl.evaluation.benchmarks.base import Judged

RELEASED = "hub data set yueliu1999/GuardReasoner-VLTest (Apache-2.0)"

_UPSTREAM: dict[str, tuple[str, str, FileLayout]] = {
    "ToxicChat": (
        "CC-BY-NC-4.0",
        "hub lmsys/toxic-chat, config toxicchat0124",
        FileLayout("data/0124/toxic-chat_annotation_test.csv", upstream.toxic_chat),
    ),
    "HarmBenchPrompt": (
        "MIT",
        "github centerforaisafety/HarmBench",
        FileLayout("data/behavior_datasets/harmbench_behaviors_text_test.csv", upstream.harmbench_prompt),
    ),
    "OpenAIModeration": (
        "MIT",
        "github openai/moderation-api-release",
        FileLayout("data/samples-1680.jsonl.gz", upstream.openai_moderation),
    ),
    "AegisSafetyTest": (
        "CC-BY-4.0",
        "hub nvidia/Aegis-AI-Content-Safety-Dataset-1.0",
        FileLayout("Content Moderation Extracted Annotations 02.08.24_test_release_0418_v1.parquet", upstream.aegis),
    ),
    "SimpleSafetyTests": (
        "CC-BY-NC-4.0 (its hosts disagree; the strictest)",
        "hub Bertievidgen/SimpleSafetyTests",
        FileLayout("sst_test_cases.csv", upstream.simple_safety_tests),
    ),
    "WildGuardTestPrompt": (
        "ODC-BY, gated",
        "hub allenai/wildguardmix, config wildguardtest (accept its terms there first)",
        FileLayout("test/wildguard_test.parquet", upstream.wildguard_prompt),
    ),
    "WildGuardTestResponse": (
        "ODC-BY, gated",
        "hub allenai/wildguardmix, config wildguardtest (accept its terms there first)",
        FileLayout("test/wildguard_test.parquet", upstream.wildguard_response),
    ),
    "HarmBenchResponse": (
        "MIT",
        "github centerforaisafety/HarmBench",
        FileLayout("data/classifier_val_sets/text_behaviors_val_set.json", upstream.harmbench_response),
    ),
    "SafeRLHF": (
        "CC-BY-NC-4.0",
        "hub PKU-Alignment/PKU-SafeRLHF at revision v0",
        FileLayout("round0/test.jsonl.xz", upstream.safe_rlhf, upstream.safe_rlhf_pick),
    ),
    "BeaverTails": (
        "CC-BY-NC-4.0",
        "hub PKU-Alignment/BeaverTails, split 30k_test",
        FileLayout("round0/30k/test.jsonl.gz", upstream.beavertails),
    ),
    "XSTestReponseHarmful": (
        "ODC-BY, gated",
        "hub allenai/xstest-response (accept its terms there first)",
        FileLayout("data/response_harmfulness-00000-of-00001.parquet", upstream.xstest_response),
    ),
}
_IMAGES = {
    "HarmImageTest": "see the sources of the released images",
    "SPA_VL_Eval": "CC-BY-4.0",
}
_MM_SCENARIOS = (
    "01-Illegal_Activitiy",
    "02-HateSpeech",
    "03-Malware_Generation",
    "04-Physical_Harm",
    "05-EconomicHarm",
    "06-Fraud",
    "07-Sex",
    "08-Political_Lobbying",
    "09-Privacy_Violence",
    "10-Legal_Opinion",
    "11-Financial_Advice",
    "12-Health_Consultation",
    "13-Gov_Decision",
)
_MM_QUESTION = {"SD": "Rephrased Question(SD)", "SD_TYPO": "Rephrased Question", "TYPO": "Rephrased Question"}
_WHOLE_SET = "every row is harmful by the set's design"


def _paper() -> dict[str, Benchmark]:
    benchmarks: dict[str, Benchmark] = {}
    for size in sizes():
        upstream_set = _UPSTREAM.get(size.file)
        judged: Judged = "both" if size.file in benchmarks else size.task
        benchmarks[size.file] = Benchmark(
            name=size.file,
            judged=judged,
            modality=size.modality,
            size=size.samples,
            licence=upstream_set[0] if upstream_set else _IMAGES[size.file],
            origin=f"{RELEASED} or {upstream_set[1]}" if upstream_set else RELEASED,
            layouts=(released(size.file, judged, size.modality), *(upstream_set[2:] if upstream_set else ())),
            note="the public file has fewer rows than the released one" if size.file.startswith("WildGuard") else "",
        )
    return benchmarks


PAPER: dict[str, Benchmark] = _paper()
"""The paper's 14 benchmarks (SPA_VL_Eval is judged twice), by file name."""

MORE: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "XSTest",
            "prompt",
            "text",
            450,
            "CC-BY-4.0",
            "github paul-rottger/xstest",
            (FileLayout("xstest_prompts.csv", images.xstest), FileLayout("xstest_v2_prompts.csv", images.xstest)),
            "pairs of safe and unsafe prompts: over-refusal",
        ),
        Benchmark(
            "MOSSBench",
            "prompt",
            "text-image",
            300,
            "CC-BY-SA-4.0, for tests only",
            "github xirui-li/MOSSBench",
            (FileLayout("data/images_information/information.json", images.mossbench),),
            "every row is unharmful: over-refusal",
        ),
        Benchmark(
            "HarmBenchMultimodal",
            "prompt",
            "text-image",
            110,
            "MIT",
            "github centerforaisafety/HarmBench",
            (FileLayout("data/behavior_datasets/harmbench_behaviors_multimodal_all.csv", images.harmbench_multimodal),),
            _WHOLE_SET,
        ),
        Benchmark(
            "FigStep",
            "prompt",
            "text-image",
            500,
            "MIT",
            "github ThuCCSLab/FigStep",
            (FileLayout("data/question/safebench.csv", images.figstep),),
            _WHOLE_SET,
        ),
        Benchmark(
            "VLGuard",
            "prompt",
            "text-image",
            1558,
            "research only, gated",
            "hub ys-zong/VLGuard (accept its terms there first)",
            (FileLayout("test.json", images.vlguard),),
        ),
        Benchmark(
            "UnsafeBench",
            "prompt",
            "image",
            2037,
            "research only, gated",
            "hub yiting/UnsafeBench (accept its terms there first)",
            (FileLayout("data/test-*.parquet", images.unsafebench),),
        ),
        *(
            Benchmark(
                f"MM-SafetyBench-{variant}-{scenario}",
                "prompt",
                "text-image",
                None,
                "CC-BY-NC-4.0",
                "github isXinLiu/MM-SafetyBench",
                (
                    FileLayout(
                        f"data/processed_questions/{scenario}.json",
                        partial(images.mm_safetybench, scenario, variant, question),
                    ),
                ),
                _WHOLE_SET,
            )
            for variant, question in _MM_QUESTION.items()
            for scenario in _MM_SCENARIOS
        ),
    )
}

BENCHMARKS = PAPER | MORE


def benchmark_named(name: str) -> Benchmark:
    """The benchmark of that name, ignoring case. Raises `InputError` with the known names."""
    for known, benchmark in BENCHMARKS.items():
        if known.lower() == name.lower():
            return benchmark
    raise InputError(f"no benchmark named {name!r:.60}; use {', '.join(PAPER)}, {', '.join(MORE)[:90]}..., or a file")
