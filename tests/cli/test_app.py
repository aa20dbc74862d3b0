"""The command line: what it prints, what it exits with, and what it never does."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import zlib
from io import BytesIO
from itertools import count
from pathlib import Path
from struct import pack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import typer.main
from PIL import Image
from typer.testing import CliRunner

from guardreasoner_vl import __version__
from guardreasoner_vl.choices import CHUNK
from guardreasoner_vl.cli import app as cli
from guardreasoner_vl.cli import moderate
from guardreasoner_vl.cli import terminal as cli_terminal
from guardreasoner_vl.cli.errors import BLOCK, ERROR, OK
from guardreasoner_vl.cli.render import one_line, printable, summary_text, verdict_text
from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.errors import EngineError, ModelError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.types import Verdict
from tests.scripted_guard import scripted_guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typer.testing import Result

    from guardreasoner_vl.engines.base import EngineRequest

COMMAND = Path(sys.executable).with_name("guardreasoner-vl")
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


@pytest.fixture(autouse=True)
def _own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets for its process must not reach the other tests."""
    monkeypatch.setattr(moderate, "be_quiet", lambda: None)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Each `Guard.load` gives a scripted guard; the list holds what was asked for."""
    calls: list[dict[str, Any]] = []

    def load(model: str = "embedded", engine: str = "auto", *, policy: Policy | None = None, **options: Any) -> Guard:
        calls.append({"model": model, "engine": engine, "policy": policy, **options})
        return scripted_guard(policy, reasoning=f"[bold]It says[/bold] {ESCAPE}\u202e so.")

    monkeypatch.setattr(Guard, "load", staticmethod(load))
    return calls


def invoke(*arguments: object, stdin: str | bytes | None = None, terminal_width: int | None = None) -> Result:
    environment = {} if terminal_width is None else {"TERMINAL_WIDTH": str(terminal_width)}
    return CliRunner(env=environment).invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


def run(*arguments: str | Path, stdin: bytes | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def assert_one_error_line(result: Result, *words: str) -> None:
    assert result.exit_code == ERROR, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("\n")
    for word in words:
        assert word in result.stderr


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), "utf-8")
    return path


# Starting


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["moderate", "--help"], ["batch", "--help"], ["--version"], ["schema"], ["moderate", "-x"]],
)
def test_light_commands_load_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom guardreasoner_vl.cli.app import main\n"
        f"sys.argv = ['guardreasoner-vl', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    modules = set(json.loads(done.stderr.splitlines()[-1].replace("'", '"')))
    assert "typer" in modules
    assert not modules & {"torch", "transformers", "tokenizers", "numpy", "PIL", "httpx", "trl", "yaml"}


def test_help_comes_in_panels_and_by_its_short_name() -> None:
    shown = invoke("-h", terminal_width=100)
    assert shown.exit_code == OK
    panels: dict[str, list[str]] = {}
    for line in shown.output.splitlines():
        if line.startswith("╭─"):
            panels[line.split()[1]] = names = []
        elif line.startswith("│ ") and line[2] != " " and panels:
            names.append(line.split()[1])
    del panels["Options"]
    assert panels == {
        "Judge": ["moderate", "batch", "schema"],
        "Serve": ["serve", "plan-capacity"],
        "Publish": ["push"],
        "Data": ["curate", "synthesize", "write-requests", "corpus"],
        "Train": ["base", "sft", "mine", "augment", "grpo", "run", "ablate", "compact", "average"],
        "Measure": ["evaluate", "calibrate", "compare", "robustness", "score"],
    }
    for command in (("moderate",), ("corpus",), ("corpus", "stats")):
        assert invoke(*command, "-h").output == invoke(*command, "--help").output


OPTIONS = {
    "": "--version --log-level --install-completion --show-completion",
    "moderate": (
        "--prompt --response --image --messages --model --engine --base-url --adapter --mode --threshold --calibration "
        "--preset --long-input --max-windows --max-new-tokens --ocr --on-error --show-reasoning --json"
    ),
    "batch": (
        "--model --engine --base-url --adapter --ray --workers --mode --threshold --calibration --preset --long-input "
        "--max-windows --max-new-tokens --ocr --on-error --show-reasoning --chunk --url --concurrency"
    ),
    "schema": "",
    "serve": "--config --host --port --model --base-url --mode --print-config",
    "plan-capacity": (
        "--per-day --prompt-tokens --completion-tokens --image-tokens --cached-tokens --gpu --utilisation "
        "--concurrency --peak --price"
    ),
    "curate": "--data --out --embed",
    "synthesize": (
        "--teacher --model --base-url --attempts --votes --concurrency --requests-per-minute --tokens-per-minute "
        "--max-cost --max-tokens --price --batch-out --batch-in"
    ),
    "write-requests": "--out --count --answered --seed",
    "base": "--out",
    "sft": "--data --out",
    "mine": "--data --out --model --engine --base-url --adapter --ray --workers",
    "augment": "--data --out",
    "grpo": "--model --data --out --validation --verify-parity",
    "run": "--out --data --stages --plan --gpus --gpu-memory --gpu",
    "ablate": "--out --data --seeds --only",
    "compact": "--out --expand",
    "average": "--share --out",
    "evaluate": (
        "--out --benchmark --data --recipe --exclude-from-total --guard --model --engine --base-url --adapter --ray "
        "--workers --mode --threshold --calibration --preset --long-input --max-windows --max-new-tokens --ocr "
        "--content"
    ),
    "calibrate": (
        "--data --out --rows --exclude --model --engine --base-url --adapter --reasoned "
        "--request-false-alarms --response-false-alarms --max-new-tokens"
    ),
    "compare": "--out",
    "robustness": (
        "--out --benchmark --data --change --model --engine --base-url --adapter --mode --long-input --max-windows "
        "--max-new-tokens --ocr"
    ),
    "score": "--rule --gold --target",
    "push": "--dry-run --private",
    "corpus stats": "",
    "corpus export": "--layout --out",
    "corpus check": "",
    "corpus import": "--out --source",
}
"""The options of each command and of the program itself: users' scripts rest on these names."""


def options_of(command: Any, name: str = "") -> Iterator[tuple[str, list[str]]]:
    """The options of a command and of those below it, by full name; a group without options of its own is left out."""
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    children: dict[str, Any] = getattr(command, "commands", {})
    if options or not children:
        yield name, [word for option in options for word in (*option.opts, *option.secondary_opts)]
    for child, below in children.items():
        yield from options_of(below, f"{name} {child}".strip())


def test_the_options_of_every_command_are_those_decided_on() -> None:
    assert dict(options_of(typer.main.get_command(cli.app))) == {name: words.split() for name, words in OPTIONS.items()}


def test_a_shell_completes_commands() -> None:
    done = run(_GUARDREASONER_VL_COMPLETE="complete_bash", COMP_WORDS="guardreasoner-vl mod", COMP_CWORD="1")
    assert (done.returncode, done.stdout.split(), done.stderr) == (OK, ["moderate"], "")


def test_the_chunk_shown_is_that_of_the_guard() -> None:
    assert f"[default: {CHUNK}]" in " ".join(invoke("batch", "--help", terminal_width=200).output.split())


def test_version_help_and_schema() -> None:
    assert invoke("--version").output == f"guardreasoner-vl {__version__}\n"
    shown = invoke("--help")
    assert shown.exit_code == OK
    assert all(name in shown.output for name in ("moderate", "batch", "schema", "sft", "block"))
    assert json.loads(invoke("schema").stdout) == Verdict.model_json_schema()


def test_without_arguments_the_help_is_shown_and_it_is_an_error() -> None:
    done = run()
    assert done.returncode == ERROR
    assert "moderate" in done.stdout + done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["moderate", "--mode", "deep"], ("--mode", "'deep'", "'slow', 'fast', 'hybrid'", "moderate --help")),
        (["moderate", "--engine", "magic"], ("--engine", "'auto', 'transformers', 'openvino', 'vllm', 'openai'")),
        (["moderate", "--on-error", "shrug"], ("'allow', 'block'",)),
        (["moderate", "--long-input", "cut"], ("'refuse', 'windows'",)),
        (["moderate", "--threshold", "high"], ("--threshold",)),
        (["moderate", "--max-new-tokens", "0"], ("--max-new-tokens",)),
        (["moderate", "--promt", "x"], ("--promt", "--prompt")),
        (["moderat"], ("moderat", "moderate")),
        (["batch", "in.jsonl"], ("OUT.jsonl", "batch --help")),
        (["batch", "in.jsonl", "out.jsonl", "--chunk", "0"], ("--chunk",)),
        (["sft"], ("RECIPE",)),
        (["moderate", "--mode", ESCAPE], ("--mode",)),
        (["moderate", "--threshold", "1.5", "--prompt", "p"], ("threshold", "from 0 to 1")),
        (["moderate", "--threshold", "nan", "--prompt", "p"], ("threshold", "from 0 to 1")),
        (["moderate", "--prompt", "-", "--response", "-"], ("only one option can be '-'",)),
        (["moderate", "--messages", "m.json", "--prompt", "p"], ("--messages", "not both")),
        (["moderate", "--messages", "m.json", "--image", "i.png"], ("--messages", "not both")),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_remedy(arguments: list[str], words: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert_one_error_line(result, *words)
    assert "\x1b" not in result.stderr
    assert "\x07" not in result.stderr


# Moderating


def test_an_allowed_and_a_blocked_exchange(loaded: list[dict[str, Any]]) -> None:
    allowed, blocked = invoke("moderate", "--prompt", "hello"), invoke("moderate", "--prompt", "BAD")
    assert (allowed.exit_code, blocked.exit_code) == (OK, BLOCK)
    assert allowed.stdout.startswith(
        "allow\n  request   unharmful (harmful with p = 0.100)\n  response  not applicable\n"
    )
    assert blocked.stdout.startswith("block\n  request   harmful (harmful with p = 0.900)\n")
    assert "scripted, slow" in allowed.stdout
    assert allowed.stderr == blocked.stderr == ""
    assert loaded[0] == {"model": "embedded", "engine": "auto", "policy": Policy()}


def test_json_is_exactly_one_verdict(loaded: list[dict[str, Any]]) -> None:
    result = invoke("moderate", "--prompt", "BAD", "--response", "fine", "--json")
    assert result.exit_code == BLOCK
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    verdict = Verdict.model_validate_json(result.stdout)
    assert (verdict.flagged, verdict.reasoning) == (True, None)


def test_reasoning_is_shown_only_if_asked_for_and_cannot_steer_the_terminal(loaded: list[dict[str, Any]]) -> None:
    assert "It says" not in invoke("moderate", "--prompt", "hello").output
    shown = invoke("moderate", "--prompt", "hello", "--show-reasoning")
    assert "[bold]It says[/bold] \\x1b]0;owned\\x07\\x1b[2J\\u202e so." in shown.stdout
    result = invoke("moderate", "--prompt", "hello", "--show-reasoning", "--json")
    assert "\x1b" not in shown.stdout + result.stdout
    reasoning = Verdict.model_validate_json(result.stdout).reasoning
    assert reasoning is not None
    assert ESCAPE in reasoning


def test_the_options_reach_the_policy_and_the_loader(loaded: list[dict[str, Any]]) -> None:
    options = ["--mode", "hybrid", "--threshold", "0.3", "--on-error", "allow", "--long-input", "windows"]
    more = ["--max-new-tokens", "77", "--ocr", "never", "--model", "owner/name", "--engine", "transformers"]
    invoke("moderate", "--prompt", "p", *options, *more)
    policy = Policy("hybrid", (0.3, 0.3), on_error="allow", long_input="windows", max_new_tokens=77, ocr="never")
    assert loaded == [{"model": "owner/name", "engine": "transformers", "policy": policy}]


def test_an_adapter_reaches_the_loader(loaded: list[dict[str, Any]], tmp_path: Path) -> None:
    invoke("moderate", "--prompt", "hi", "--model", "owner/name", "--adapter", tmp_path)
    assert (loaded[0]["model"], loaded[0]["adapter"]) == ("owner/name", tmp_path)


def test_the_most_windows_reach_the_policy(loaded: list[dict[str, Any]]) -> None:
    invoke("moderate", "--prompt", "p", "--long-input", "windows", "--max-windows", "9")
    assert loaded[0]["policy"] == Policy(long_input="windows", max_windows=9)
    assert_one_error_line(invoke("moderate", "--prompt", "p", "--max-windows", "9"), "needs --long-input windows")


def test_a_base_url_means_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def engine(**how: Any) -> Any:
        asked.append(how)
        return SimpleNamespace(connect=lambda: scripted_guard().engine)

    monkeypatch.setattr("guardreasoner_vl.engines.openai.engine.OpenAIEngine", engine)
    assert invoke("moderate", "--prompt", "BAD", "--base-url", "http://localhost:1/v1").exit_code == BLOCK
    invoke("moderate", "--prompt", "p", "--base-url", "http://localhost:1/v1", "--engine", "openai", "--model", "m")
    assert asked == [
        {"base_url": "http://localhost:1/v1", "model": None},
        {"base_url": "http://localhost:1/v1", "model": "m"},
    ]
    assert_one_error_line(invoke("moderate", "--prompt", "p", "--engine", "openai"), "needs --base-url")
    clash = invoke("moderate", "--prompt", "p", "--engine", "transformers", "--base-url", "http://localhost:1/v1")
    assert_one_error_line(clash, "--base-url needs --engine openai")


@pytest.mark.parametrize(
    ("arguments", "stdin", "asked"),
    [
        (["--prompt", "-"], b"from stdin\n", "Human user:\nfrom stdin\n\n"),
        (["--prompt", "-"], b"two\r\n\r\n", "Human user:\ntwo\n\n\n"),
        (["--prompt", "q", "--response", "-"], "straße".encode(), "AI assistant:\nstraße\n"),
        (["--messages", "-"], b'\xef\xbb\xbf[{"role": "user", "content": "chat"}]', "Human user:\nchat\n"),
        (
            ["--messages", "-"],
            b'{"model": "m", "messages": [{"role": "user", "content": "body"}]}',
            "Human user:\nbody\n",
        ),
    ],
)
def test_a_dash_reads_standard_input(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], stdin: bytes, asked: str
) -> None:
    guard = scripted_guard()
    monkeypatch.setattr(Guard, "load", lambda *_, **__: guard)
    assert invoke("moderate", *arguments, stdin=stdin).exit_code == OK
    assert asked in guard.engine.requests[0].messages[-1].text  # type: ignore[attr-defined]


def test_a_conversation_from_a_file(loaded: list[dict[str, Any]], tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "BAD"}]
    assert invoke("moderate", "--messages", write(tmp_path / "m.json", turns)).exit_code == BLOCK


def test_several_images(loaded: list[dict[str, Any]], tmp_path: Path) -> None:
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    Image.new("RGB", (60, 60), "blue").save(tmp_path / "b.jpg")
    result = invoke("moderate", "--image", tmp_path / "a.png", "--image", tmp_path / "b.jpg", "--json")
    assert result.exit_code == OK
    assert Verdict.model_validate_json(result.stdout).request.label == "unharmful"


# What cannot be judged


def test_an_error_is_said_and_exits_2_whatever_the_policy(loaded: list[dict[str, Any]]) -> None:
    for policy in ("block", "allow"):
        result = invoke("moderate", "--prompt", "BROKEN", "--on-error", policy)
        assert_one_error_line(result, "out of order; try again", f"(engine, {policy})")
        result = invoke("moderate", "--prompt", "BROKEN", "--on-error", policy, "--json")
        assert result.exit_code == ERROR
        verdict = Verdict.model_validate_json(result.stdout)
        assert (verdict.flagged, verdict.action) == (None, policy)
        assert result.stderr == f"error: the engine is out of order; try again (engine, {policy})\n"


def test_what_its_author_made_unreadable_is_blocked_whatever_the_policy(
    loaded: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    source = write(tmp_path / "in.jsonl", {"id": 1, "prompt": "p", "images": ["a.png"]})
    alone = invoke("moderate", "--prompt", "p", "--image", tmp_path / "a.png", "--json", "--on-error", "allow")
    batch = invoke("batch", source, tmp_path / "out.jsonl", "--on-error", "allow")
    assert (alone.exit_code, batch.exit_code) == (ERROR, ERROR)
    for verdict in map(json.loads, (alone.stdout, (tmp_path / "out.jsonl").read_text())):
        assert (verdict["error"]["code"], verdict["action"]) == ("invalid_image", "block")


def huge_png() -> bytes:
    """19,000 x 19,000 black pixels in some tens of KB."""

    def part(kind: bytes, content: bytes) -> bytes:
        return pack(">I", len(content)) + kind + content + pack(">I", zlib.crc32(kind + content))

    pixels = zlib.compress(bytes((1 + 19_000 // 8) * 19_000), 9)
    header = pack(">IIBBBBB", 19_000, 19_000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", pixels) + part(b"IEND", b"")


def many_frames() -> bytes:
    encoded = BytesIO()
    frames = [Image.new("RGB", (32, 32), (5 * number, 0, 0)) for number in range(50)]
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:])
    return encoded.getvalue()


def truncated_jpeg() -> bytes:
    encoded = BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(encoded, "JPEG")
    return encoded.getvalue()[:4000]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.png", None, ("none.png", "No such file", "check the path")),
        ("text.png", lambda: b"just words\n", ("PNG", "convert it")),
        ("cut.jpg", truncated_jpeg, ("cannot be decoded", "save it again")),
        ("huge.png", huge_png, ("19000 x 19000", "shrink")),
        ("many.gif", many_frames, ("frames", "send fewer frames")),
        ("empty.png", lambda: b"", ("empty",)),
    ],
)
def test_a_bad_image_is_one_line_before_any_model_is_loaded(
    loaded: list[dict[str, Any]],
    tmp_path: Path,
    name: str,
    content: Callable[[], bytes] | None,
    words: tuple[str, ...],
) -> None:
    path = tmp_path / name
    if content:
        path.write_bytes(content())
        assert path.stat().st_size < 100_000
    before = list(tmp_path.iterdir())
    assert_one_error_line(invoke("moderate", "--image", path), "invalid_image", *words)
    as_json = invoke("moderate", "--image", path, "--json")
    assert as_json.exit_code == ERROR
    error = Verdict.model_validate_json(as_json.stdout).error
    assert error is not None
    assert error.code == "invalid_image"
    assert list(tmp_path.iterdir()) == before
    assert loaded == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("the exchange is empty", "give a prompt, an image or a response")),
        (["--prompt", "  \n"], ("the exchange is empty",)),
        (["--image", "https://example.org/a.png"], ("invalid_image", "remote images are not fetched")),
        (["--messages", "none.json"], ("none.json", "No such file")),
        (["--messages", "text.json"], ("text.json: not JSON", "list of chat messages")),
        (["--messages", "deep.json"], ("not JSON",)),
        (["--messages", "system.json"], ("no user or assistant message",)),
        (["--messages", "other.json"], ("messages must be a list",)),
    ],
)
def test_an_exchange_that_is_none_is_one_line(
    loaded: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("hello")
    Path("deep.json").write_text("[" * 100_000)
    write(Path("system.json"), [{"role": "system", "content": "p"}])
    write(Path("other.json"), {"prompt": "p"})
    assert_one_error_line(invoke("moderate", *arguments), "(invalid_", *words)
    assert loaded == []


def test_standard_input_that_is_no_text(loaded: list[dict[str, Any]]) -> None:
    assert_one_error_line(invoke("moderate", "--prompt", "-", stdin=b"\xff\xfe"), "not UTF-8: convert it")
    assert_one_error_line(invoke("moderate", "--prompt", "a\udcff"), "not valid Unicode")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, ("no such folder",)),
        ({}, ("no config.json",)),
        ({"config.json": "{"}, ("config.json", "cannot be read as JSON")),
        ({"config.json": '{"model_type": "llama"}'}, ("Qwen2.5-VL family",)),
        ({"config.json": '{"model_type": "qwen2_5_vl"}'}, ("no .safetensors weights",)),
    ],
)
def test_a_model_that_cannot_be_used_is_one_line(
    tmp_path: Path, files: dict[str, str] | None, words: tuple[str, ...]
) -> None:
    folder = tmp_path / "model"
    if files is not None:
        folder.mkdir()
    for name, content in (files or {}).items():
        (folder / name).write_text(content)
    assert_one_error_line(invoke("moderate", "--prompt", "p", "--model", folder), "(model, block)", *words)


def test_a_fault_of_ours_names_the_place_and_not_the_content(
    monkeypatch: pytest.MonkeyPatch, loaded: list[dict[str, Any]]
) -> None:
    def faulty(*_: Any, **__: Any) -> Any:
        raise RuntimeError("SECRET")

    monkeypatch.setattr(Guard, "moderate_batch", faulty)
    result = invoke("moderate", "--prompt", "SECRET")
    assert_one_error_line(result, "internal fault: RuntimeError in test_app.py, line ", "please report it")
    assert "SECRET" not in result.output


@pytest.mark.parametrize(
    ("level", "levels"), [("debug", ["WARNING", "DEBUG"]), ("warning", ["WARNING"]), ("error", [])]
)
def test_the_log_tells_the_place_of_a_fault_and_not_the_content(
    level: str, levels: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reply(_: EngineRequest) -> str:
        raise RuntimeError("SECRET")

    monkeypatch.setattr(Guard, "load", lambda *_, policy, **__: Guard(ScriptedEngine(reply), policy))
    result = invoke("--log-level", level, "moderate", "--prompt", "SECRET")
    assert result.exit_code == ERROR
    assert "SECRET" not in result.output
    assert caplog.records == []  # another handler would print the text of the exception
    *logged, error = result.stderr.splitlines()
    assert error.startswith("error: the engine failed (RuntimeError)")
    records = [json.loads(line) for line in logged]
    assert [record["level"] for record in records] == levels
    if level == "debug":
        (fault,) = records[-1]["exceptions"]
        assert fault["type"] == "RuntimeError"
        assert "test_app.py" in fault["frames"][-1]
    assert_one_error_line(invoke("moderate", "--prompt", "SECRET"), "the engine failed")  # without a log


def test_only_this_package_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, policy: Policy, **__: Any) -> Guard:
        for name in ("guardreasoner_vl.stages", "transformers"):
            logging.getLogger(name).info("said by %s", name)
        return scripted_guard(policy)

    monkeypatch.setattr(Guard, "load", load)
    logged = invoke("--log-level", "info", "moderate", "--prompt", "hello").stderr
    assert [json.loads(line)["message"] for line in logged.splitlines()] == ["said by guardreasoner_vl.stages"]


def test_a_service_logs_as_its_configuration_says() -> None:
    assert_one_error_line(invoke("--log-level", "debug", "serve", "--print-config"), "set log_level there")


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Guard, "load", interrupted)
    assert invoke("moderate", "--prompt", "p").exit_code == 130
    result = invoke("batch", write(tmp_path / "in.jsonl", {"id": 1, "prompt": "p"}), tmp_path / "out.jsonl")
    assert result.exit_code == 130
    assert "run the same command to resume" in result.stderr


# The real thing


@pytest.mark.slow
def test_a_verdict_of_a_real_model_is_all_there_is_on_stdout(tiny_model: Path) -> None:
    done = run("moderate", "--prompt", "hello", "--model", tiny_model, "--mode", "fast", "--json")
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    verdict = Verdict.model_validate_json(done.stdout)
    assert done.returncode == (BLOCK if verdict.flagged else OK)
    assert verdict.error is None
    assert verdict.model.revision


@pytest.mark.slow
def test_a_reader_that_has_gone_is_an_error_and_not_a_verdict() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([COMMAND, "schema"], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (ERROR, b"")


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_not_a_verdict() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([COMMAND, "schema"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == ERROR
    assert done.stderr.decode().splitlines()[0].startswith("error: No space left")


# Batches


def test_a_batch_and_its_summary(loaded: list[dict[str, Any]], tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": n, "prompt": "BAD" if n == 2 else "p", f"note{ESCAPE}": 1} for n in range(3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("batch", source, out, "--mode", "slow", "--chunk", "2", "--show-reasoning")
    assert result.exit_code == OK, result.output
    assert result.stdout == ""
    assert "judged 3 rows\n" in result.stderr
    assert "action   allow 2, block 1\n" in result.stderr
    assert "request  unharmful 2, harmful 1\n" in result.stderr
    assert "tokens in" in result.stderr
    assert "moderations/s" in result.stderr
    assert "not judged: the fields note\\x1b]0;owned" in result.stderr
    assert "\x1b" not in result.stderr
    assert "It says" in out.read_text()
    assert "judged 0 rows, 3 earlier" in invoke("batch", source, out).stderr


def test_a_batch_with_errors_or_rejected_lines_exits_2(loaded: list[dict[str, Any]], tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": 1, "prompt": "BROKEN"}\nnot JSON\n[]\n{"id": 2, "prompt": "p"}\n')
    result = invoke("batch", source, out, "--on-error", "allow")
    assert result.exit_code == ERROR
    assert "errors   engine 1; the next run judges these rows again" in result.stderr
    assert "rejected 2 lines, listed in" in result.stderr
    assert "line 2: not JSON" in result.stderr
    assert "line 3: not a JSON object" in result.stderr
    assert (tmp_path / "out.rejected.jsonl").exists()


def test_a_batch_that_cannot_start_is_one_line_and_no_file(
    loaded: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert_one_error_line(invoke("batch", source, out), "no such file", "give a JSONL file")
    write(source, {"id": 1, "prompt": "p"})
    assert_one_error_line(invoke("batch", source, source), "IN and OUT must be different files")
    assert loaded == []
    out.write_text("my notes\n")
    assert_one_error_line(invoke("batch", source, out), "not a batch's verdict", "name another OUT")
    assert out.read_text() == "my notes\n"
    out.unlink()

    def missing(*_: Any, **__: Any) -> Any:
        raise ModelError("no weights; download them")

    monkeypatch.setattr(Guard, "load", missing)
    assert_one_error_line(invoke("batch", source, out), "no weights; download them")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_terminal_gets_a_progress_bar(
    loaded: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", {"id": 1, "prompt": "p"})
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert "1/1" in invoke("batch", source, tmp_path / "a.jsonl").stderr
    monkeypatch.delenv("FORCE_COLOR")
    shown = invoke("batch", source, tmp_path / "b.jsonl").stderr
    assert "1/1" not in shown
    assert "progress" not in shown


def test_without_a_terminal_progress_is_a_line_now_and_then(
    loaded: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"id": {number}, "prompt": "p"}}\n' for number in range(6)))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(cli_terminal, "LINE_SECONDS", 2.5)
    seconds = count()
    monkeypatch.setattr(cli_terminal, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    shown = invoke("batch", source, tmp_path / "out.jsonl", "--chunk", "1").stderr
    lines = [line for line in shown.splitlines() if line.startswith("progress")]
    assert lines == ["progress: 3 of 6", "progress: 6 of 6"]


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_of_libraries_are_hidden_without_a_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    cli_terminal.hide_bars()
    assert os.environ == ({} if terminal else dict.fromkeys(names, "1"))


# Training


def test_sft_prints_the_model_and_what_was_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from guardreasoner_vl.stages import sft

    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: small\nmodel: {path: somewhere}\n")

    def trained(recipe: Any, data: Path, out: Path, progress: Any) -> Path:
        (out / "sft").mkdir(parents=True)
        skipped = {"too long": 3, "no label": 20}
        write(out / "sft" / "data.json", {"rows": 12_000, "tokens": 1_000_000, "skipped": skipped})
        assert (recipe.name, data) == ("small", tmp_path / "data")
        return out / "sft" / "model"

    monkeypatch.setattr(sft, "run", trained)
    result = invoke("sft", recipe, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert result.exit_code == OK
    assert result.stdout == f"{tmp_path}/out/sft/model\n"
    assert result.stderr == "trained on: tokens 1,000,000, rows 12,000\nskipped: no label 20, too long 3\n"
    recipe.write_text("name: small\nmodle: {}\n")
    assert_one_error_line(invoke("sft", recipe, "--data", tmp_path, "--out", tmp_path), "did you mean 'model'")
    assert_one_error_line(invoke("sft", tmp_path / "no.yaml", "--data", tmp_path, "--out", tmp_path), "cannot be read")


# Text for terminals


def test_printable_writes_out_what_could_steer_a_terminal_or_hide() -> None:
    assert printable("plain ä 漢 \U0001f600\n\ttab") == "plain ä 漢 \U0001f600\n\ttab"
    assert printable("\x1b[31m\x9b\x00\r\x7f") == r"\x1b[31m\x9b\x00\r\x7f"
    assert printable("\u202e\u2066\u200b\ufeff\u2028\ue000\udcff") == r"\u202e\u2066\u200b\ufeff\u2028\ue000\udcff"
    assert one_line("a\n\n b\tc\x1b") == r"a b c\x1b"


def test_colours_say_what_the_words_say() -> None:
    verdict = next(scripted_guard().moderate_batch([{"prompt": "BAD", "response": "BAD"}]))
    styles = {str(span.style) for span in verdict_text(verdict, show_reasoning=True).spans}
    assert {"bold white on red", "bold red"} <= styles
    assert "Looked at it." in verdict_text(verdict, show_reasoning=True).plain


def test_a_long_list_of_rejected_lines_is_cut(tmp_path: Path) -> None:
    from guardreasoner_vl.batch.moderate import run_batch

    (tmp_path / "in.jsonl").write_text("x\n" * 1000)
    summary = run_batch(scripted_guard(), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    text = summary_text(summary, "out.rejected.jsonl").plain
    assert "rejected 1,000 lines" in text
    assert text.count("line ") == 5


def test_the_scripted_guard_fails_as_an_engine_does() -> None:
    verdict = next(scripted_guard().moderate_batch([{"prompt": "BROKEN"}]))
    assert verdict.error is not None
    assert verdict.error.code == EngineError.code
