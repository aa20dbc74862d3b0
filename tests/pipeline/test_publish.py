"""Publishing: which files, which are refused, and what a stand-in for the hub receives."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from typer.testing import CliRunner

from guardreasoner_vl.cli import app as cli
from guardreasoner_vl.cli.errors import ERROR, OK
from guardreasoner_vl.corpus.card import write_card
from guardreasoner_vl.corpus.stats import stats_of
from guardreasoner_vl.corpus.store import CorpusInfo, SourceInfo, read_corpus, write_corpus
from guardreasoner_vl.engines.model_files import folder_digest
from guardreasoner_vl.errors import DataError, GuardError, InputError, ModelError
from guardreasoner_vl.pipeline.publish import dry_run, publication, push
from guardreasoner_vl.types import Sample
from tests.made_images import image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.slow
CARD = "---\nlicense: apache-2.0\n---\n\n# A guard\n"


class Hub:
    """A stand-in for the hub: `uploads` holds each repository's files; `public` names those that are public already."""

    def __init__(self) -> None:
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.kinds: dict[str, str] = {}
        self.private: dict[str, bool] = {}
        self.refuses: Exception | None = None

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool | None, exist_ok: bool) -> str:
        assert exist_ok
        if self.refuses:
            raise self.refuses
        self.kinds[repo_id] = repo_type
        self.private.setdefault(repo_id, bool(private))
        return f"https://hub.example/{repo_id}"

    def repo_info(self, repo_id: str, *, repo_type: str) -> Any:
        return type("Info", (), {"private": self.private[repo_id]})

    def upload_folder(self, *, repo_id: str, folder_path: Path, repo_type: str, commit_message: str) -> None:
        assert repo_type == self.kinds[repo_id]
        assert commit_message
        self.uploads[repo_id] = contents(folder_path)


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: stand_in)
    return stand_in


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "README.md").write_text(CARD)
    return folder


def corpus_in(
    folder: Path, images: Sequence[Path] = (), licences: Sequence[str] = ("CC0-1.0",), embed: bool = False
) -> Path:
    sources = tuple(SourceInfo(name=f"s{at}", origin="o", licence=name) for at, name in enumerate(licences))
    row = Sample(
        id="1",
        source="s0",
        modality="text-image" if images else "text",
        prompt="Bread?",
        request_label="unharmful",
        images=tuple(map(str, images)),
    )
    write_corpus(folder, CorpusInfo(name="toy", sources=sources), [row], embed=embed)
    write_card(folder, stats_of(read_corpus(folder)), "a command")
    return folder


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image(56, 56).png)
    return path


def test_a_dry_run_writes_what_is_uploaded(model: Path, hub: Hub, tmp_path: Path) -> None:
    dry_run(model, "me/guard", tmp_path / "dry")
    assert not hub.uploads
    assert push(model, "me/guard", private=False) == "https://hub.example/me/guard"
    assert contents(tmp_path / "dry") == hub.uploads["me/guard"] == contents(model)
    assert (hub.kinds, hub.private) == ({"me/guard": "model"}, {"me/guard": False})
    assert folder_digest(tmp_path / "dry") == folder_digest(model)


def test_a_corpus_gets_its_card_as_readme(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    corpus_in(folder, [picture(folder / "images" / "a.png")])
    before = contents(folder)
    push(folder, "me/rows", private=True)
    files = hub.uploads["me/rows"]
    assert contents(folder) == before
    assert (hub.kinds["me/rows"], hub.private["me/rows"]) == ("dataset", True)
    assert {name: files[name] for name in files if name != "README.md"} == {
        name: before[name] for name in before if name != "card.md"
    }
    _, header, card = files["README.md"].decode().split("---\n", 2)
    assert card.strip() == before["card.md"].decode().strip()
    assert yaml.safe_load(header)["license"] == "cc0-1.0"
    assert yaml.safe_load(header)["configs"] == [{"config_name": "default", "data_files": "rows.parquet"}]


@pytest.mark.parametrize("licences", [("CC0-1.0", "MIT"), ("research only",), ()])
def test_a_licence_that_the_hub_does_not_know_is_other(tmp_path: Path, licences: tuple[str, ...]) -> None:
    readme = publication(corpus_in(tmp_path / "corpus", licences=licences)).readme
    assert readme.startswith("---\nlicense: other\n")


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "checkpoint-3/model.safetensors",
        "audit.jsonl",
        "model.safetensors.1-ab.partial",
        ".lock",
        "x/y.svg",
    ],
)
def test_files_that_do_not_belong_are_refused(model: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    for folder, error in ((model, ModelError), (corpus_in(tmp_path / "corpus"), DataError)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
        with pytest.raises(error, match="do not belong") as caught:
            push(folder, "me/it", private=False)
        assert name in str(caught.value)
    assert not hub.kinds


@pytest.mark.parametrize("card", [None, "# A guard\n", "---\ntags: [x]\n---\n", "---\n- x\n---\n", "---\na: [\n---\n"])
def test_a_model_needs_a_card_with_a_licence(model: Path, card: str | None) -> None:
    if card is None:
        (model / "README.md").unlink()
    else:
        (model / "README.md").write_text(card)
    with pytest.raises(ModelError, match="no README.md" if card is None else "states no licence"):
        publication(model)


def test_a_corpus_needs_its_card(tmp_path: Path) -> None:
    (corpus_in(tmp_path / "corpus") / "card.md").unlink()
    with pytest.raises(DataError, match=r"no card\.md; write it with `corpus stats`"):
        publication(tmp_path / "corpus")


def test_images_elsewhere_are_not_published(tmp_path: Path) -> None:
    elsewhere = picture(tmp_path / "pictures" / "a.png")
    with pytest.raises(DataError, match="--embed"):
        publication(corpus_in(tmp_path / "corpus", [elsewhere]))
    assert "rows.parquet" in publication(corpus_in(tmp_path / "embedded", [elsewhere], embed=True)).files


def test_a_public_repository_gets_nothing_private(model: Path, hub: Hub) -> None:
    hub.private["me/guard"] = False
    with pytest.raises(DataError, match="exists and is public"):
        push(model, "me/guard", private=True)
    assert not hub.uploads


@pytest.mark.parametrize("fault", [OSError("no network"), ValueError("LocalTokenNotFound")])
def test_what_the_hub_refuses_is_one_line(model: Path, hub: Hub, fault: Exception) -> None:
    hub.refuses = fault
    with pytest.raises(DataError, match=r"the hub refused .*hf auth login"):
        push(model, "me/guard", private=False)


def test_the_target_of_a_dry_run_is_new(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        dry_run(model, "me/guard", model)
    with pytest.raises(GuardError, match="no name of a repository"):
        dry_run(model, "me/guard/again", tmp_path / "dry")
    with pytest.raises(InputError, match="neither a model"):
        publication(tmp_path)


def test_the_command(model: Path, hub: Hub, tmp_path: Path) -> None:
    def invoke(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli.app, ["push", str(model), "me/guard", *arguments])
        return result.exit_code, result.output

    code, output = invoke("--dry-run", str(tmp_path / "dry"))
    assert (code, f"{len(contents(model))} files of a model" in output) == (OK, True)
    assert invoke("--private") == (OK, "https://hub.example/me/guard\n")
    code, output = invoke("--dry-run", str(tmp_path / "other"), "--private")
    assert (code, "--private has no effect with --dry-run" in output) == (ERROR, True)
