"""
Folders of strangers: a checkpoint to resume, a model to import. None of their code runs, no file of this machine
travels with them, no input of theirs takes longer than seconds: each ends with one line that names file and field.
"""
import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_bad_input import SHAPE, TINY, ends, pretrain_words, script
from test_hf import official
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

import checkpoint
import distributed
import eval as evaluation
import hf
import mtp
import pretrain
import sft
from configurator import UserError
from data import shards
from tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")   # torch, of saving on one process

DEEP = "[" * 200_000 + "]" * 200_000


class Evil:
    """A pickle of it runs a command: it would leave the file `ran`."""
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder}/ran",)


def put(path: Path, value) -> None:
    """A file of bytes or text, a pipe ("fifo"), or a link to another path."""
    path.unlink(missing_ok=True)
    if value == "fifo":
        os.mkfifo(path)
    elif isinstance(value, Path):
        path.symlink_to(value)
    else:
        path.write_bytes(value if isinstance(value, bytes) else value.encode())


# ---- checkpoints: DCP's metadata is a pickle ------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path):
    """-> (run folder, its checkpoint, model, optimizer); the optimizer lies in optimizer/, as from several ranks."""
    model = checkpoint.materialise(mtp.build(SHAPE, "meta"), distributed.setup(device="cpu"), seed=0)
    optimizer = distributed.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    checkpoint.save(tmp_path / "run", 1, model, optimizer=optimizer, tokenizer=TINY, config={}, meta={"stage": "base"},
                    state={"seen": 1})
    ckpt = tmp_path / "run/step_00000001"
    dcp.save(checkpoint.optimizer_state(model, optimizer), checkpoint_id=str(ckpt / "optimizer"), no_dist=True)
    describe(ckpt)
    return tmp_path / "run", ckpt, model, optimizer


def describe(ckpt: Path) -> None:
    """A manifest that names every file of the folder as it is now, as its maker would write it."""
    manifest = checkpoint.read_manifest(ckpt)
    (ckpt / "manifest.json").unlink()
    checkpoint.write_json(ckpt / "manifest.json", manifest | {"files": checkpoint.fingerprints(ckpt, 0, 1)})


def test_an_optimizer_of_dcp_is_read_whole(run):
    _, ckpt, model, optimizer = run
    right = checkpoint.optimizer_state(model, optimizer)
    other = distributed.adamw(model, 1e-3, (0.9, 0.95), 0.1)
    checkpoint.load_optimizer(ckpt, model, other)
    for name, parts in checkpoint.optimizer_state(model, other).items():
        assert parts["exp_avg"].any() and all(torch.equal(parts[key], right[name][key]) for key in parts)


def changed(ckpt: Path, change) -> bytes:
    metadata = pickle.loads((ckpt / "optimizer/.metadata").read_bytes())
    change(metadata)
    return pickle.dumps(metadata)


def as_bytes(metadata: Metadata) -> None:
    """torch unpickles what the metadata calls bytes, without its own weights_only."""
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = next(iter(metadata.storage_data.values()))


def elsewhere(metadata: Metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../../../secret"


CLASS_CHANGED = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x03\x00\x00\x00abcK\x01s\x86b."
METADATA = {
    "runs a command": lambda c: pickle.dumps(Evil(c.parent)),
    "runs it in a field": lambda c: changed(c, lambda m: setattr(m, "planner_data", {"a": Evil(c.parent)})),
    "by an old protocol": lambda c: b"cos\nsystem\n(S'touch " + str(c.parent).encode() + b"/ran'\ntR.",
    "builtins.eval": lambda c: b"cbuiltins\neval\n(S'1/0'\ntR.",
    "a function of torch": lambda c: b"ctorch\nload\n(S'x'\ntR.",
    "a dotted name": lambda c: b"\x80\x04\x8c\x05torch\x8c\x11Size.__class__.mro\x93.",
    "bytes that torch unpickles": lambda c: changed(c, as_bytes),
    "files outside": lambda c: changed(c, elsewhere),
    "changes a class": lambda c: CLASS_CHANGED,
    "2^40 bytes": lambda c: b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    "memo of 2^31": lambda c: b"\x80\x02K\x01r\xff\xff\xff\x7f.",
    "an extension": lambda c: b"\x80\x02\x82\x01.",
    "a persistent id": lambda c: b"\x80\x02K\x01Q.",
    "not Metadata": lambda c: pickle.dumps({"a": 1}),
    "cut off": lambda c: (c / "optimizer/.metadata").read_bytes()[:-100],
    "empty": lambda c: b"",
}


@pytest.mark.parametrize("what", METADATA)
def test_no_metadata_runs_code(run, what):
    """Named by the manifest with its right checksum: the folder as its maker wrote it."""
    _, ckpt, model, optimizer = run
    put(ckpt / "optimizer/.metadata", METADATA[what](ckpt))
    describe(ckpt)
    assert checkpoint.problem_with(ckpt) is None
    line = ends(lambda: checkpoint.load_optimizer(ckpt, model, optimizer), ckpt / "optimizer")
    assert not (ckpt.parent / "ran").exists() and len(line) < 400, line
    import torch.distributed.checkpoint.metadata as untouched
    assert not hasattr(untouched.Metadata, "abc")


def test_a_script_that_resumes_runs_no_code(run, tmp_path):
    """pretrain.py --out=FOLDER: optimizer/.metadata named by the manifest, and put beside it."""
    folder, ckpt, _, _ = run
    for name in ("data", "data/valid"):
        shards.write_source(tmp_path / name, "web", [[1, 2, 3, TINY.eos_id]] * 40, TINY.vocab_size)
    words = [w.replace("{'web': 1, 'maths': 1}", "{'web': 1}") for w in pretrain_words(tmp_path, f"--out={folder}")]
    (ckpt / "optimizer").rename(tmp_path / "optimizer")
    shutil.rmtree(folder)
    script(pretrain, *words)()                                       # a whole run of 4 steps
    whole = checkpoint.latest(folder)
    (tmp_path / "optimizer").rename(whole / "optimizer")
    put(whole / "optimizer/.metadata", pickle.dumps(Evil(folder)))
    describe(whole)
    assert checkpoint.problem_with(whole) is None
    ends(script(pretrain, *words, "--stages.0.tokens=512"), whole / "optimizer/.metadata", "posix.system")
    (whole / "manifest.json").write_text((whole / "manifest.json").read_text().replace("optimizer/.metadata", "x"))
    assert "optimizer/.metadata is in the folder, but manifest.json does not name it" in checkpoint.problem_with(whole)
    with suppress(SystemExit):
        script(pretrain, *words, "--stages.0.tokens=512")()
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("file, value, wrong", [
    ("model.safetensors.index.json", '{"weight_map": {}}', "does not name it"),
    ("chat_template.jinja", "x", "does not name it"), ("optimizer/__1_0.distcp", b"x", "does not name it"),
    ("sub", Path("/"), "does not name it"), ("optimizer/pipe", "fifo", "does not name it"),
    (".DS_Store", b"x", None), ("._model.json", b"x", None), ("optimizer/.nfs000001", b"x", None),
    ("train_state.pt", "fifo", "is missing"), ("model.json", Path("/dev/zero"), "is missing"),
    ("manifest.json", "fifo", "manifest.json is not readable"),
    ("manifest.json", DEEP, "manifest.json is not readable"),
    ("manifest.json", '{"files": {"../../latest": [18, "0"]}}', "does not name it"),
    ("manifest.json", '{"files": [1]}', "manifest.json is not readable"),
])
def test_what_the_manifest_does_not_say(run, file, value, wrong):
    _, ckpt, _, _ = run
    put(ckpt / file, value)
    found = checkpoint.problem_with(ckpt)
    assert found is wrong if wrong is None else wrong in found, found


def test_the_training_state_runs_no_code(run, tmp_path):
    _, ckpt, _, _ = run
    torch.save({"optimizer": {}, "rng": Evil(tmp_path)}, ckpt / "train_state.pt")
    ends(lambda: checkpoint.torch_load(ckpt), ckpt / "train_state.pt")
    put(ckpt / "train_state.pt", "fifo")
    ends(lambda: checkpoint.torch_load(ckpt), ckpt / "train_state.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("shape, words", [
    ({"n_layer": 10**7}, "n_layer"), ({"d_model": 2**40}, "impossible sizes"), ({"vocab_size": 2**62}, "impossible"),
    ({"d_ff": 10**30}, "below 2^63"), ({"max_seq_len": 2**62}, "impossible"), ({"n_layer": "1"}, "n_layer"),
    ({"rms_eps": float("nan")}, "rms_eps"), ({"n_mtp": 10**7}, "n_mtp"), ([1], "object"), (DEEP, "nested"),
    ("fifo", "not a file"), (Path("/dev/zero"), "not a file"),
])
def test_shapes_of_a_checkpoint_without_manifest(tmp_path, shape, words):
    folder = tmp_path / "c"
    folder.mkdir()
    TINY.save(folder)
    put(folder / "model.json", json.dumps(vars(SHAPE) | shape) if isinstance(shape, dict) else
        json.dumps(shape) if isinstance(shape, list) else shape)
    for module, flag in ((evaluation, "ckpt"), (sft, "init")):
        more = [f"--problems={tmp_path}/p.jsonl"] if module is evaluation else \
            [f"--data={tmp_path}/d.jsonl", "--seq_len=32"]
        ends(script(module, f"--{flag}={folder}", f"--out={tmp_path}/o.json", "--device=cpu", *more),
             *(() if words == "not a file" else ("model.json", words)))


@pytest.mark.parametrize("value", ["../x.safetensors", "/etc/passwd", ["a"], {"a": 1}, None, 3])
def test_a_native_index_names_files_of_its_folder(tmp_path, value):
    put(tmp_path / "model.safetensors.index.json", json.dumps({"weight_map": {"norm.weight": value}}))
    ends(lambda: checkpoint.weight_files(tmp_path), "model.safetensors.index.json", "name of a file in its folder")


# ---- Hugging Face folders -------------------------------------------------------------------------------------------

CONFIGS = [{"num_hidden_layers": 10**7}, {"num_hidden_layers": 2**70}, {"num_hidden_layers": -1},
           {"num_nextn_predict_layers": 10**7}, {"hidden_size": 2**40}, {"hidden_size": 2**70}, {"hidden_size": 0},
           {"vocab_size": 2**62}, {"vocab_size": 10**400}, {"intermediate_size": 2**62},
           {"num_attention_heads": 0, "head_dim": None}, {"num_attention_heads": 2**40}, {"head_dim": 2**50},
           {"max_position_embeddings": 2**62}, {"rms_norm_eps": float("nan")}, {"rms_norm_eps": float("inf")},
           {"rope_theta": float("inf")}, {"rope_theta": 10**400}, {"rope_theta": []},
           {"rope_parameters": [1]}, {"rope_parameters": "x"}, {"rope_parameters": 5},
           {"rope_theta": None, "rope_parameters": {"rope_theta": {}}}, {"rope_parameters": {"rope_type": []}},
           {"layer_types": 5}, {"layer_types": {"a": 1}}, {"layer_types": [[]]}, {"model_type": {}},
           {"tie_word_embeddings": [0]}, {"hidden_act": {}}, {"num_key_value_heads": 0}]


@pytest.mark.parametrize("changes", CONFIGS, ids=lambda c: f"{c!s:.50}")
def test_hostile_configs(tmp_path, changes):
    official(tmp_path / "hub", **changes)
    ends(lambda: hf.import_folder(tmp_path / "hub", tmp_path / "run"), "config.json")


FILES = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "vocab.json",
         "tokenizer_config.json", "special_tokens_map.json"]
VALUES = {"nested": DEEP, "empty": "", "a list": "[1]", "a number": "7", "null": "null", "not UTF-8": b"\xff{",
          "digits": '{"a": ' + "9" * 10_000 + "}", "large": "sparse"}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("file", FILES)
def test_hostile_json(tmp_path, file, value):
    """Every JSON file that is read, of every wrong kind; "large" is 1 TB of zeros in a sparse file."""
    official(tmp_path / "hub")
    if file == "vocab.json":
        (tmp_path / "hub/tokenizer.json").unlink()
    put(tmp_path / "hub" / file, VALUES[value])
    if value == "large":
        os.truncate(tmp_path / "hub" / file, 1 << 40)
    ends(lambda: hf.import_folder(tmp_path / "hub", tmp_path / "run"), file if value != "digits" else "")
    assert not list(tmp_path.glob("run/step*"))


@pytest.mark.parametrize("file", [*FILES, "model-00001-of-00003.safetensors", "chat_template.jinja"])
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_pipes_and_devices_are_not_waited_for(tmp_path, file, what):
    """Where a file may be absent, a pipe in its place is as if it were; else the run ends with a line."""
    official(tmp_path / "hub")
    put(tmp_path / "hub" / file, "fifo" if what == "pipe" else Path("/dev/zero"))
    try:
        hf.import_folder(tmp_path / "hub", tmp_path / "run")
    except UserError as e:
        assert "\n" not in str(e)
        return
    assert file not in ("config.json", "model-00001-of-00003.safetensors")


def vocabulary(change):
    def edit(hub):
        data = json.loads((hub / "tokenizer.json").read_text())
        change(data)
        (hub / "tokenizer.json").write_text(json.dumps(data))
    return edit


def chain(data):
    """Tokens of 2, 3 ... 1,024 bytes for each of 26 letters, each made of the one before: minutes to check."""
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    for letter in map(chr, range(97, 123)):
        for n in range(2, 1025):
            vocab.setdefault(letter * n, 2000 + len(vocab))
            merges.append(f"{letter * (n - 1)} {letter}")


def config_of(**changes):
    def edit(hub):
        path = hub / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return edit


TOKENIZERS = {
    "id -1": vocabulary(lambda d: d["added_tokens"][0].update(id=-1)),
    "id 2^62": vocabulary(lambda d: d["added_tokens"][0].update(id=2**62)),
    "id 1.5": vocabulary(lambda d: d["added_tokens"][0].update(id=1.5)),
    "id list": vocabulary(lambda d: d["added_tokens"][0].update(id=[1])),
    "id null": vocabulary(lambda d: d["added_tokens"][0].update(id=None)),
    "id in vocabulary": vocabulary(lambda d: d["model"]["vocab"].update(zzz=-5)),
    "content": vocabulary(lambda d: d["added_tokens"][0].update(content=5)),
    "added": vocabulary(lambda d: d.update(added_tokens=5)),
    "vocab": vocabulary(lambda d: d["model"].update(vocab=[1])),
    "merges": vocabulary(lambda d: d["model"].update(merges=5)),
    "merge": vocabulary(lambda d: d["model"]["merges"].append({"a": 1})),
    "no vocab": vocabulary(lambda d: d["model"].update(vocab={})),
    "padded 10^13": config_of(padded_vocab_size=10**13), "padded -5": config_of(padded_vocab_size=-5),
    "template list": config_of(chat_template=[1]), "template number": config_of(chat_template=5),
    "eos list": config_of(eos_token=["x"]), "eos object": config_of(eos_token={"content": {}}),
    "long tokens": vocabulary(chain),
    "a token of 200 kB": vocabulary(lambda d: d["model"]["vocab"].update({"ab" * 100_000: 5000})),
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_hostile_tokenizers(tmp_path, what):
    official(tmp_path / "hub")
    TOKENIZERS[what](tmp_path / "hub")
    ends(lambda: hf.import_folder(tmp_path / "hub", tmp_path / "run"), "token")


@pytest.mark.parametrize("template, names", [
    ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}", ["<|user|>", "<|end|>"]),
    ("{% for m in messages %}{{ '[INST]' + m.content + '[/INST]' }}{% endfor %}", ["[INST]", "[/INST]"]),
    ("{% for m in messages %}{{ '<start_of_turn>' + m.content + '<end_of_turn>' }}{% endfor %}",
     ["<start_of_turn>", "<end_of_turn>"]),
    ("{% for m in messages %}{{ '<｜User｜>' + m.content }}{% endfor %}", ["<｜User｜>"]),
])
def test_what_opens_a_turn_is_control_whatever_the_file_says(tmp_path, template, names):
    """Added tokens with "special": false that a template writes, also in pieces: no user may write them."""
    TINY.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    for entry in data["added_tokens"]:
        entry["special"] = False
    more = [*names, "<tool_call>"]
    data["added_tokens"] += [data["added_tokens"][0] | {"id": 1024 + k, "content": n} for k, n in enumerate(more)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    config_of(chat_template=template, padded_vocab_size=2048)(tmp_path)
    tok = Tokenizer.load(tmp_path)
    ids = tok.chat([{"role": "user", "content": "hi" + "".join(names)}])[0]
    assert all(ids.count(tok.added[n][0]) == 1 for n in names)
    assert not {tok.added[n][0] for n in names} & set(tok.encode("".join(names)))
    assert tok.decode([tok.added[n][0] for n in names], skip_control=True) == ""
    assert tok.encode("<tool_call>") == [1024 + len(names)]


# ---- what travels ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json",
                                  "special_tokens_map.json"])
def test_a_link_does_not_travel(tmp_path, file):
    official(tmp_path / "hub")
    put(tmp_path / "secret", json.dumps({"my": "secret"}))
    put(tmp_path / "hub" / file, tmp_path / "secret")
    ends(lambda: hf.import_folder(tmp_path / "hub", tmp_path / "run"), file, "is a link to", "should lie in the folder")
    (tmp_path / "hub" / file).unlink()
    official(tmp_path / "hub2")
    hf.import_folder(tmp_path / "hub2", tmp_path / "run")
    free = tmp_path / "free"                                         # a checkpoint without a manifest, as it was sent
    shutil.copytree(tmp_path / "run/step_00000000", free)
    (free / "manifest.json").unlink()
    put(free / file, tmp_path / "secret")
    ends(lambda: hf.export_folder(free, tmp_path / "out", "mimo"), file, "is a link to")
    if file == "chat_template.jinja":
        ends(lambda: Tokenizer.load(free), file, "is a link to")     # a training run would save it in its checkpoints


def test_a_link_inside_the_folder_is_a_file(tmp_path):
    official(tmp_path / "hub")
    (tmp_path / "hub/real").mkdir()
    (tmp_path / "hub/tokenizer_config.json").rename(tmp_path / "hub/real/t.json")
    put(tmp_path / "hub/tokenizer_config.json", Path("real/t.json"))
    hf.import_folder(tmp_path / "hub", tmp_path / "run")


def test_code_of_a_publisher_stays_behind(tmp_path):
    """auto_map would have transformers run the code of another repository; ours names our own modeling_mimo.py."""
    evil = {"auto_map": {"AutoTokenizer": ["evil--x.Y", None]}, "custom_pipelines": {"x": {"impl": "evil--x.Y"}}}
    official(tmp_path / "hub", **evil)
    config_of(**evil)(tmp_path / "hub")
    hf.import_folder(tmp_path / "hub", tmp_path / "run")
    for flavour in ("qwen2", "mimo"):
        hf.export_folder(tmp_path / "run", tmp_path / flavour, flavour)
    for path in [*tmp_path.glob("run/**/*.json"), *tmp_path.glob("qwen2/*.json"), *tmp_path.glob("mimo/*.json")]:
        assert "evil" not in path.read_text(), path
    assert json.loads((tmp_path / "mimo/config.json").read_text())["auto_map"] == hf.AUTO_MAP


def test_names_of_mtp_tensors(tmp_path):
    """Layer 10^8 of a folder of MTP layers, or a number of 5,000 digits, is no layer."""
    from safetensors.torch import save_file
    official(tmp_path / "hub")
    for k, digits in enumerate(("99999999", "9" * 5000, "8")):
        (tmp_path / f"mtps{k}").mkdir()
        save_file({f"model.mtp_layers.{digits}.input_proj.weight": torch.zeros(1)},
                  tmp_path / f"mtps{k}" / "model.safetensors")
        ends(lambda k=k: hf.import_folder(tmp_path / "hub", tmp_path / "run", tmp_path / f"mtps{k}"), "no tensor of an")
