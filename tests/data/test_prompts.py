"""Prompts of classes, the builtin tokenizer and those of transformers."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from madformer.config import DataConfig, TextConfig, load_experiment
from madformer.config.data import BUILTIN_VOCABULARY
from madformer.data import prompts
from madformer.data.datamodule import LatentDataModule
from madformer.data.prompts import DIGIT_NAMES, PromptTokenizer, class_prompts, parse_classes
from madformer.errors import ConfigError, InputError
from madformer.model.embedding import null_text
from tests.hub import fill_cache, serve_hub
from tests.tiny_runs import DIGITS

TEXT = TextConfig(vocab_size=BUILTIN_VOCABULARY, length=16, pad_token_id=0)
BUILTIN_FILE = Path(prompts.__file__).with_name(prompts.BUILTIN_FILE)


@pytest.fixture(scope="module")
def builtin():
    return PromptTokenizer("builtin", TEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The builtin tokenizer with a begin-of-text token that it puts before every text, saved by transformers."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(BUILTIN_FILE))
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BUILTIN_VOCABULARY)])
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>").save_pretrained(path)
    return path


# Class names


def test_imagenet_has_a_thousand_distinct_names_in_order():
    names = class_prompts("imagenet", None)
    assert len(names) == 1000 and len({name.casefold() for name in names}) == 1000
    assert all(name == " ".join(name.split()) != "" for name in names)
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 360: "otter", 974: "geyser", 999: "toilet tissue"}
    alike = {134: "crane (bird)", 517: "crane (machine)", 264: "Cardigan Welsh corgi", 474: "cardigan", 639: "tank suit"}
    assert {label: names[label] for label in known | alike} == known | alike


def test_names_of_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\ufeffKater\r\n  Hündin \nКот", encoding="utf-8")
    assert class_prompts(str(file), ["a", "b"]) == ("Kater", "Hündin", "Кот")


def test_names_of_the_data_set_are_taken_as_they_are():
    assert class_prompts(None, ["crane", "crane", ""]) == ("crane", "crane", "")
    assert class_prompts(None, None) is None


@pytest.mark.parametrize(
    ("content", "flaw"),
    [
        (b"cat\n\ndog\n", "line 2 is blank"),
        (b"cat\ndog\ncat\n", "line 3 repeats line 1, 'cat'"),
        (b"", "is empty"),
        (b"caf\xe9\n", "cannot be read as UTF-8"),
        (None, "no such file; must be imagenet or a text file"),
    ],
)
def test_broken_files_of_names(tmp_path, content, flaw):
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^data.class_names = .*names.txt': {flaw}"):
        class_prompts(str(file), None)


# The command line's classes


def test_classes_by_number_and_name():
    names = class_prompts("imagenet", None)
    assert parse_classes("207,360", names) == [207, 360]
    assert parse_classes(" 0, 999,0", names) == [0, 999, 0]
    assert parse_classes("Golden Retriever,7,crane (bird)", names) == [207, 7, 134]
    assert parse_classes(",".join(map(str, range(1000))), names) == list(range(1000))


def test_class_names_with_commas_or_digits_or_another_case():
    names = ["tench, Tinca tinca", "tench", "2", "Cardigan", "cardigan"]
    assert parse_classes("tench, tinca tinca,tench,0", names) == [0, 1, 0]
    assert parse_classes("2", names) == [2] and parse_classes("4", names) == [4]
    assert parse_classes("cardigan,Cardigan", names) == [4, 3]
    with pytest.raises(InputError, match="^--classes CARDIGAN: the name of several classes: 3, 4; give the number$"):
        parse_classes("CARDIGAN", names)


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("1000", r"--classes 1000: must be in 0\.\.999"),
        ("3,-1", r"--classes -1: must be in 0\.\.999"),
        ("7,goldn retriver", r"--classes goldn retriver: no class of that name; the nearest is golden retriever \(207\)"),
        ("1,,2", "--classes: an empty entry; .*"),
        ("", "--classes: an empty entry; .*"),
        ("1.5", "--classes 1.5: no class of that name; .*"),
    ],
)
def test_classes_that_are_none(text, flaw):
    with pytest.raises(InputError, match=f"^{flaw}$"):
        parse_classes(text, class_prompts("imagenet", None))


# The builtin tokenizer


def test_builtin_is_what_the_script_makes():
    path = Path(__file__).parents[2] / "scripts" / "train_tokenizer.py"
    spec = importlib.util.spec_from_file_location("train_tokenizer", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    trained, shipped = script.train(), Tokenizer.from_file(str(BUILTIN_FILE))
    assert trained.to_str() == shipped.to_str() == script.train().to_str()
    assert shipped.get_vocab_size() == BUILTIN_VOCABULARY and shipped.token_to_id("<pad>") == 0
    assert sorted(shipped.get_vocab().values()) == list(range(BUILTIN_VOCABULARY))


@given(st.text() | st.sampled_from(["<pad>", "a <pad> b", " \n\t", "🦙 ﬁ é ǆ"]))
def test_builtin_takes_any_text_and_gives_it_back(text):
    wide = TextConfig(vocab_size=BUILTIN_VOCABULARY, length=4 * len(text) + 1, pad_token_id=0)
    ids = PromptTokenizer("builtin", wide)([text])[0]
    count = int((ids != 0).sum())
    assert not ids[count:].any() and (ids < BUILTIN_VOCABULARY).all()
    assert Tokenizer.from_file(str(BUILTIN_FILE)).decode(ids[:count].tolist(), skip_special_tokens=False) == text


def test_class_names_are_short_and_distinct_in_tokens(builtin):
    names = [*class_prompts("imagenet", None), *DIGIT_NAMES]
    tokens_BT = builtin(names)
    assert (tokens_BT != 0).sum(1).max() == 8
    assert len(tokens_BT.unique(dim=0)) == len(names)


def test_prompts_are_cut_and_padded_on_the_right(builtin):
    short, long = builtin(["tench", "tench " * 40])
    assert short.shape == (16,) and short.dtype == torch.int64
    count = int((short != 0).sum())
    assert 0 < count < 16 and torch.equal(short[:count], long[:count])
    assert not short[count:].any() and long.all()
    assert torch.equal(builtin(["", ""]), null_text(TEXT, 2))
    assert builtin([]).shape == (0, 16)


# Tokenizers of transformers


def test_class_numbers_with_bos_are_padded_on_the_left(folder):
    """As in the released code's branch for ImageNet: BOS and the number, short prompts filled in front."""
    pad, bos = 0, BUILTIN_VOCABULARY
    text = TextConfig(vocab_size=BUILTIN_VOCABULARY + 1, length=5, pad_token_id=pad)
    numbers = class_prompts("imagenet", None, "numbers")
    assert numbers[:2] == ("0", "1") and numbers[999] == "999" and len(numbers) == 1000
    tokenizer = PromptTokenizer(str(folder), text, bos=True, padding_side="left")
    plain = PromptTokenizer("builtin", text)
    ids = [token for token in plain(["207"])[0].tolist() if token != pad]
    assert tokenizer(["207"])[0].tolist() == [pad] * (4 - len(ids)) + [bos, *ids]
    assert torch.equal(tokenizer([""]), null_text(text, 1))
    assert tokenizer(["tench " * 40])[0].tolist() == [bos, *plain(["tench " * 40])[0, :4].tolist()]


def test_classes_whose_prompts_are_cut_to_the_same_tokens_are_named(caplog, folder, tmp_path):
    builtin = PromptTokenizer("builtin", replace(TEXT, length=1))
    builtin.warn_if_equal(DIGIT_NAMES)
    assert caplog.text == ""
    builtin.warn_if_equal(class_prompts("imagenet", None, "numbers"))
    assert "model.text.length = 1 cuts '1' and '10' to the same tokens: raise it" in caplog.text
    caplog.clear()
    text = f"model.text={{vocab_size: {BUILTIN_VOCABULARY + 1}, pad_token_id: 0, length: 1}}"
    LatentDataModule(load_experiment(DIGITS, [text, f"data.tokenizer={folder}", "data.bos=true", f"output_dir={tmp_path}"]))
    assert caplog.text.count("model.text.length = 1 cuts 'zero' and 'one' to the same tokens") == 1


def test_a_tokenizer_without_bos_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="^data.bos = true: data.tokenizer=builtin has no BOS token$"):
        DataConfig(tokenizer="builtin", bos=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": None}))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError, match="^data.bos = true: data.tokenizer=.* has no BOS token$"):
        PromptTokenizer(str(tmp_path), TextConfig(vocab_size=BUILTIN_VOCABULARY + 1, length=4, pad_token_id=0), bos=True)


def test_a_folder_gives_the_text_s_tokens_alone(folder, builtin):
    text = TextConfig(vocab_size=BUILTIN_VOCABULARY + 1, length=16, pad_token_id=0)
    texts = ["tench", "", "crane (bird)", "<bos>", "<pad>", "tench " * 400]
    tokens_BT = PromptTokenizer(str(folder), text)(texts)
    assert torch.equal(tokens_BT, builtin(texts))  # no begin-of-text token, and none that a prompt could smuggle in
    assert torch.equal(tokens_BT[1:2], null_text(text, 1))


def test_padding_may_lie_outside_the_tokenizer_or_be_any_special_token(folder):
    for pad in (0, 2048, 2049):
        text = TextConfig(vocab_size=2050, length=4, pad_token_id=pad)
        assert PromptTokenizer(str(folder), text)(["tench"])[0, -1] == pad


@pytest.mark.parametrize(
    ("vocab_size", "pad", "flaw"),
    [
        (2048, 0, "model.text.vocab_size = 2048: data.tokenizer=.* has ids up to 2048: "),
        (2049, 7, "model.text.pad_token_id = 7: stands for a piece of text in data.tokenizer=.*: "),
    ],
)
def test_models_that_do_not_fit(folder, vocab_size, pad, flaw):
    right = "set model.text.vocab_size=2049 and model.text.pad_token_id=0"
    with pytest.raises(ConfigError, match=f"^{flaw}{right}$"):
        PromptTokenizer(str(folder), TextConfig(vocab_size=vocab_size, length=4, pad_token_id=pad))


def test_a_tokenizer_without_special_tokens_needs_one_id_more_for_padding(tmp_path):
    tokenizer = json.loads(BUILTIN_FILE.read_text(encoding="utf-8")) | {"added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="set model.text.vocab_size=2049 and model.text.pad_token_id=2048$"):
        PromptTokenizer(str(tmp_path), TEXT)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": '{"model_type": "gpt2"}'},
        {"config.json": '{"model_type": "t5"}'},
        {"tokenizer.json": '{"version"'},
        {"tokenizer.json": '{"version": "1.0", "model": {"type": "None"}}'},
        {"config.json": "{}", "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}'},
    ],
)
def test_folders_that_hold_no_tokenizer(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="^data.tokenizer = '.*': cannot be had: .*data.tokenizer=builtin .*$"):
        PromptTokenizer(str(tmp_path), TEXT)


def test_a_misspelt_folder():
    with pytest.raises(ConfigError, match="cannot be had: no such folder, and no hub id, which is owner/name; must be"):
        PromptTokenizer("./no/such/folder", TEXT)


ASK = """
import sys, time
from madformer.config import DataConfig, TextConfig, load_experiment
from madformer.errors import ConfigError
from madformer.data.prompts import PromptTokenizer
for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        print(PromptTokenizer(name, TextConfig(vocab_size=2049, length=4, pad_token_id=0))(["tench"]).tolist())
    except ConfigError as error:
        print(error)
    assert time.monotonic() - start < 20
"""


def ask_hub(endpoint, cache, *names):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", ASK, *names], env=environment, capture_output=True, text=True, check=True)
    assert "Retrying" not in done.stderr
    return done.stdout.splitlines()


def test_hubs_answers_and_the_cache(tmp_path, folder, builtin):
    (fill_cache(tmp_path, folder, name="cached") / "config.json").write_text("{}")
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"config.json": b"{}", "model.safetensors": b"large"}
    with serve_hub(files) as endpoint:
        names = ("cached", "name", "gated", "missing", "down")
        cached, loaded, gated, missing, down = ask_hub(endpoint, tmp_path, *(f"owner/{name}" for name in names))
    assert json.loads(cached) == json.loads(loaded) == builtin(["tench"])[:, :4].tolist()
    assert not list(tmp_path.glob("models--owner--name/snapshots/*/*.safetensors"))
    assert (
        "data.tokenizer = 'owner/gated': cannot be had: no such folder, and the repository's owner must grant access" in gated
    )
    assert "the hub has no such repository" in missing and "the hub refuses: Server error '503" in down

    cached_still, uncached = ask_hub(endpoint, tmp_path, "owner/cached", "owner/gated")
    assert cached_still == cached
    assert uncached.startswith(
        "data.tokenizer = 'owner/gated': cannot be had: no such folder, and it is not in the cache, and the hub"
    )
    assert uncached.endswith(
        "or data.tokenizer=builtin model.text.vocab_size=2048 model.text.pad_token_id=0, which ships with the package"
    )


# Workers


def test_pickled_tokenizers_do_the_same(folder):
    text = TextConfig(vocab_size=BUILTIN_VOCABULARY + 1, length=16, pad_token_id=0)
    for name in ("builtin", str(folder)):
        tokenizer = PromptTokenizer(name, text)
        texts = ["crane (bird)", "<pad>", ""]
        assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(texts), tokenizer(texts))


FORK = """
import os, sys, torch
from torch.utils.data import DataLoader
from madformer.config import DataConfig, TextConfig, load_experiment
from madformer.data.prompts import PromptTokenizer
for name in sys.argv[1:]:
    tokenizer = PromptTokenizer(name, TextConfig(vocab_size=2049, length=8, pad_token_id=0))
    texts = [f"class {number}" for number in range(64)]
    here = tokenizer(texts)
    loader = DataLoader(texts, 32, collate_fn=tokenizer, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), here)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"  # newer releases of tokenizers do not warn, older ones do
"""


def test_forked_workers_tokenize_without_a_warning(folder):
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-W", "ignore", "-c", FORK, "builtin", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "fork" not in done.stderr, done.stderr
