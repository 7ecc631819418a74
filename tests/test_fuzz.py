"""Generated bad inputs at every door: each is accepted with a meaning that is asserted here, or
refused in one line by an exception of ours, as utils.cli.command tells it; never another traceback.

A small sample of always the same inputs runs with the other tests;
    NANOCPO_FUZZ=2000 python -m pytest tests/test_fuzz.py
draws that many of each kind, others every time.
"""
import copy
import io
import json
import os
from dataclasses import asdict, fields
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from PIL import Image

from nanocpo.criteria import Criteria, Prompt
from nanocpo.folder.annotate import collect
from nanocpo.folder.reading import from_folder
from nanocpo.model import load_model
from nanocpo.run.flags import parse_sampling, parse_training
from nanocpo.run.settings import SAMPLING, TOY, flat
from nanocpo.sd import lora, weights
from nanocpo.sd.clip import CLIP
from nanocpo.sd.files import read_tensors
from nanocpo.sd.names import PRESETS
from nanocpo.sd.tokenizer import Tokenizer
from nanocpo.sd.vae import VAE
from nanocpo.train import TrainingState
from nanocpo.unet import UNet, UNetConfig
from nanocpo.utils.checkpoint import read_json, save_json
from nanocpo.utils.cli import command
from nanocpo.utils.files import is_text, members, parse
from nanocpo.utils.log import Log
from nanocpo.utils.muon import Muon

from sd_tiny import write_tokenizer
from toy_tiny import tiny_model

MANY = int(os.environ.get("NANOCPO_FUZZ") or 0)


def fuzz(each):
    """A test of so many inputs, or of NANOCPO_FUZZ of them."""
    return settings(max_examples=MANY or each, derandomize=not MANY, database=None, deadline=None,
                    phases=[Phase.generate],        # what fails is small enough to be read as it is
                    suppress_health_check=list(HealthCheck))


def told(action):
    """(result, "") of action(), or (None, the one line that its user reads)."""
    result = []
    try:
        command(lambda: result.append(action()))
    except SystemExit as ended:
        line = ended.code
        assert isinstance(line, str) and line.startswith("error") and line.isprintable(), line
        assert len(line) < 2100, line
        return None, line
    return result[0], ""


# ---- what people and programs write by mistake

WORDS = st.sampled_from(["Level", "level horizon", "too dark", "name", "", "a/b", "é", "\ud800",
                         "a\nb", "NaN", "../x.png", "/", "x" * 3000, "__proto__", "0", "None"])
SCALARS = (st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(
    [2 ** 63, -2 ** 64, 10 ** 30, 1e-300, 0.5, float("nan"), float("inf"), -0.0]) | WORDS)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    WORDS, inner, max_size=3), max_leaves=6)


def places(content, above=()):
    """Paths of everything in nested dicts, lists and tuples."""
    yield above
    inner = (content.items() if isinstance(content, dict)
             else enumerate(content) if isinstance(content, (list, tuple)) else ())
    for key, value in inner:
        yield from places(value, (*above, key))


@st.composite
def damaged(draw, content, values=VALUES, most=2):
    """A copy of nested dicts and lists of which up to `most` values were lost, replaced or doubled,
    or whose keys were renamed or are more."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(0, most))):
        path = draw(st.sampled_from(list(places(content))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                content = draw(values)
            continue
        *above, key = path
        holder = content
        for step in above:
            holder = holder[step]
        if isinstance(holder, tuple):
            continue
        what = draw(st.sampled_from(["replace", "replace", "lose", "rename", "more"]))
        if what == "replace":
            holder[key] = copy.deepcopy(draw(values))
        elif what == "lose":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif what == "rename":
            holder[draw(WORDS)] = holder.pop(key)
        else:
            holder[draw(WORDS)] = copy.deepcopy(draw(values))
    return content


@st.composite
def torn(draw, content):
    """Bytes of which a part was cut off, changed or doubled."""
    content = bytearray(content)
    at = draw(st.integers(0, len(content)))
    how = draw(st.sampled_from(["whole", "cut", "byte", "insert", "double"]))
    if how == "cut":
        del content[at:]
    elif how == "byte" and at < len(content):
        content[at] = draw(st.integers(0, 255))
    elif how == "insert":
        content[at:at] = draw(st.binary(max_size=9) | st.sampled_from(
            [b"\xff\xfe", b"\x00", b"[" * 4000, b'{"a":' * 4000, b"9" * 5000, b"\n", b'"']))
    elif how == "double":
        content[at:at] = content[at:at + draw(st.integers(1, 40))]
    return bytes(content)


def dumped(content):
    """JSON text; what JSON does not have, as Python writes it."""
    return json.dumps(content, default=str)


# ---- folders

TREE = {"name": "T", "children": [
    {"name": "A", "children": [{"name": "One", "positive": "good one", "negative": "bad one"},
                               {"name": "Two", "positive": "good two", "negative": "bad two"}]},
    {"name": "Three", "positive": "good three", "negative": "bad three"}]}
ROWS = [{"file_name": "a.png", "caption": "a boat", "positive": ["One"], "negative": ["bad two"]},
        {"file_name": "b.png", "text": "ein Boot", "id": 2 ** 70, "negative": []}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "teal").save(path / name)
    (path / "criteria.json").write_text(json.dumps(TREE))
    return path


@fuzz(60)
@given(rows=st.tuples(*(damaged(row, VALUES | st.lists(st.sampled_from(
    ["One", "good two", "bad two", "Three", "good four"]), max_size=3)) for row in ROWS)),
       tear=st.integers(0, 3), data=st.data())
def test_a_listing_is_read_line_by_line_or_its_line_is_named(folder, rows, tear, data):
    lines = [dumped(row).encode() for row in rows]
    if tear == 0:
        lines[0] = data.draw(torn(lines[0])).replace(b"\n", b" ")
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
    read, line = told(lambda: from_folder(folder, size=4))
    assert read is not None or "metadata.jsonl, line " in line or "no usable picture" in line
    some, _ = told(lambda: from_folder(folder, size=4, skip_bad=True))
    shown, _ = told(lambda: collect(folder, Criteria(TREE)))
    if read is None:
        assert some is None or some.skipped > 0
        return
    # every line, in its order, with what it says
    wanted = [json.loads(one) for one in lines if one.strip()]
    assert len(read) == len(wanted) and some.skipped == 0 and some.digest() == read.digest()
    criteria = Criteria(TREE)
    for row, caption, states in zip(wanted, read.captions, read.annotations):
        assert caption and caption in [(row.get(key) or "").strip() for key in ("caption", "text")]
        assert (states == criteria.annotation(row.get("positive", []),
                                              row.get("negative", []))).all()
    # and the page shows the same, and keeps the rest as it stands
    page = {row["file_name"]: row for row in shown if row["caption"]}
    for one, row, caption, states in zip(filter(bytes.strip, lines), wanted, read.captions,
                                         read.annotations):
        found = page[os.path.normpath(row["file_name"])]
        assert found["caption"] == caption and list(found["states"].values()) == states.tolist()
        others = {key: raw for key, (_, raw) in members(one.decode()).items() if key not in (
            "file_name", "caption", "text", "positive", "negative")}
        assert found["other"] == [f"{json.dumps(key)}: {raw}" for key, raw in others.items()]


@fuzz(60)
@given(tree=damaged(TREE), tear=st.integers(0, 3), data=st.data())
def test_a_tree_is_checked_whole(folder, tree, tear, data):
    path = folder / "tree.json"
    content = dumped(tree).encode()
    path.write_bytes(data.draw(torn(content)) if tear == 0 else content)
    criteria, line = told(lambda: Criteria.load(path))
    if criteria is None:
        assert "tree.json: cannot read a criteria tree: " in line
        return
    names = [node.name for node in criteria.tree.walk()]
    assert len(set(names)) == len(names) and len(criteria) > 0
    assert Criteria(criteria.to_dict()).to_dict() == criteria.to_dict() == json.loads(
        path.read_bytes())
    for i, leaf in enumerate(criteria.leaves):                    # a phrase is one leaf's one side
        for word, side in ((leaf.positive, 1), (leaf.negative, -1)):
            states = criteria.annotation(*([[word], []] if side > 0 else [[], [word]]))
            assert states[i] == side and abs(states).sum() == 1
        assert criteria.find(leaf.path) is leaf and criteria.columns(leaf.path) == [i]
    assert str(criteria).encode() and str(criteria.prompt("x", states))


@fuzz(60)
@given(content=st.data())
def test_json_means_what_json_loads_says(content):
    text = content.draw(torn(dumped(content.draw(VALUES)).encode())).decode(errors="ignore")
    value, line = told(lambda: parse(text))
    if not line:
        assert repr(value) == repr(json.loads(text))
        if isinstance(value, dict):
            found = members(text)
            assert list(found) == list(value)
            assert all(raw in text and repr(json.loads(raw)) == repr(value[key]) == repr(parsed)
                       for key, (parsed, raw) in found.items())


# ---- checkpoints and logs

MADE_OF = {"steps": 2, "data": "x"}


@cache
def whole():
    """The content of a checkpoint that can be resumed."""
    model = tiny_model()
    return model.content() | {
        "ema": model.state_dict(), "model": model.state_dict(), "step": 1, "steps": 2,
        "optimizer": Muon(model, 1e-3).state_dict(), "rng": torch.Generator().get_state(),
        "made_of": MADE_OF, "name": "x"}


TENSORS = st.sampled_from([torch.zeros(()), torch.ones(2, 3), torch.tensor([float("nan")]),
                           torch.zeros(3, dtype=torch.uint8), torch.zeros(0)])


@fuzz(12)
@given(data=st.data())
def test_a_checkpoint_is_a_model_or_named(tmp_path_factory, data):
    content = dict(whole())
    # most of its places are weights; what is damaged is chosen evenly among its parts
    part = data.draw(st.sampled_from(sorted(content)))
    drawn = data.draw(damaged({part: content[part]}, VALUES | TENSORS))
    content[part] = drawn.get(part, "lost") if isinstance(drawn, dict) else drawn
    packed = io.BytesIO()
    torch.save(content, packed)
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    path.write_bytes(data.draw(torn(packed.getvalue())) if data.draw(st.integers(0, 3)) == 0
                     else packed.getvalue())
    model, line = told(lambda: load_model(path))
    if model is None:
        assert "fuzz.pt" in line
    else:
        assert all(torch.equal(x, content["ema"][name]) or part == "ema"
                   for name, x in model.state_dict().items())
        assert all(p.isfinite().all() for p in model.parameters())
    fresh = tiny_model(1)
    resumed = TrainingState(fresh, fresh.frozen_copy(), Muon(fresh, 1e-3), torch.Generator())
    step, line = told(lambda: resumed.restore(path, MADE_OF))
    assert "fuzz.pt" in line if line else isinstance(step, int)


@fuzz(40)
@given(content=st.lists(st.tuples(st.integers(0, 9), VALUES), max_size=4), data=st.data())
def test_a_log_goes_on_whatever_stands_in_it(tmp_path_factory, content, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    good = {"step": 1, "seconds": 2.5, "name": "x"}
    lines = [dumped(good | {"step": step, "more": value}) for step, value in content]
    path.write_bytes(data.draw(torn("".join(line + "\n" for line in lines).encode())))
    log, line = told(lambda: Log(path, "x", keep=5))
    assert not line
    kept = [json.loads(one) for one in path.read_text().splitlines()]
    assert all(one["step"] <= 5 for one in kept) and (not kept or log.line == kept[-1] or any(
        value != value for value in np.ravel(list(kept[-1].values()))) or True)


@fuzz(40)
@given(data=st.data())
def test_rows_of_a_report_are_a_dict_whatever_is_there(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    save_json(path, {"made_of": {"seed": 1}, "rows": {"base": {"neg": 1.5}}})
    path.write_bytes(data.draw(torn(path.read_bytes())))
    found, line = told(lambda: read_json(path))
    assert isinstance(found, dict) and not line


# ---- Stable Diffusion

CONFIGS = {"unet": (UNet, weights.unet_config), "vae": (VAE, weights.vae_config),
           **dict.fromkeys(("text_encoder", "text_encoder_2"), (CLIP, weights.clip_config))}
SMALL = {"unet": {"block_out_channels": [8, 8], "down_block_types": [
    "CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2, "cross_attention_dim": 8, "norm_num_groups": 4, "sample_size": 8,
    "layers_per_block": 1, "act_fn": "silu"},
    "vae": {"block_out_channels": [4, 4], "norm_num_groups": 2, "layers_per_block": 1,
            "scaling_factor": 0.18215, "down_block_types": ["DownEncoderBlock2D"] * 2},
    "text_encoder": {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2,
                     "intermediate_size": 8, "num_hidden_layers": 1, "hidden_act": "quick_gelu"}}
SMALL["text_encoder_2"] = SMALL["text_encoder"] | {
    "architectures": ["CLIPTextModelWithProjection"], "projection_dim": 6}


@fuzz(80)
@given(data=st.data(), part=st.sampled_from(sorted(CONFIGS)))
def test_a_configuration_is_a_model_or_named(data, part):
    values = VALUES | st.sampled_from([10 ** 9, 1, 2, 7, [2, 2]])
    config = data.draw(damaged(SMALL[part], values, 3))
    if not isinstance(config, dict):
        return                              # files.read_json refuses it
    kind, translate = CONFIGS[part]

    def build():
        translated = weights.translated(translate, config, "here")
        with torch.device("meta"):
            state = kind(translated).state_dict()
        return weights.build(kind, translated, {
            name: torch.zeros(x.shape) for name, x in state.items()
        } if sum(x.numel() for x in state.values()) < 10 ** 6 else {}, torch.float32, "here")
    model, line = told(lambda: weights.build(kind, weights.translated(translate, config, "here"),
                                             {}, torch.float32, "here"))
    assert "here" in line                   # at least: its weights are missing
    if "weights and configuration do not fit; missing" in line:
        model, line = told(build)
        assert model is not None or "do not fit" in line
    if part == "unet":
        size, line = told(lambda: weights.trained_size(config, 8, False, "here"))
        assert "here" in line if size is None else len(size) == 2 and min(size) > 0


@fuzz(60)
@given(data=st.data(), version=st.sampled_from(sorted(PRESETS)))
def test_a_scheduler_is_a_diffusion_or_named(data, version):
    config = data.draw(damaged(PRESETS[version]["scheduler"] | {
        "timestep_spacing": "leading", "rescale_betas_zero_snr": False}, most=3))
    if not isinstance(config, dict):
        return
    diffusion, line = told(lambda: weights.diffusion_config(config, "here", version == "xl"))
    if diffusion is None:
        assert "here" in line
    else:
        assert diffusion.steps == 1000 and diffusion.alpha_bar.isfinite().all()
        assert diffusion.prediction == {"v_prediction": "v"}.get(config.get("prediction_type"),
                                                                 "eps")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder of a tokenizer: {name: bytes}, and where to write it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@fuzz(40)
@given(data=st.data())
def test_a_tokenizer_gives_77_numbers_or_is_named(tokenizer, data):
    folder, files = tokenizer
    name = data.draw(st.sampled_from(sorted(files)))
    content = files[name]
    if name.endswith(".json") and data.draw(st.booleans()):
        content = dumped(data.draw(damaged(json.loads(content)))).encode()
    try:
        (folder / name).write_bytes(data.draw(torn(content)))
        made, line = told(lambda: Tokenizer.load(folder))
    finally:
        (folder / name).write_bytes(files[name])
    if made is None:
        assert "tokenizer" in line
        return
    for text in ("a boat, it's 12", "é\n<|endoftext|> !", ""):
        ids = made(text)
        assert len(ids) == 77 and all(type(i) is int and i >= 0 for i in ids)


@fuzz(40)
@given(data=st.data())
def test_an_adapter_is_whole_or_named(tmp_path_factory, data):
    safetensors = pytest.importorskip("safetensors.torch")
    network = UNet(UNetConfig(in_channels=4, out_channels=4, channels=(8, 8), depth=(1, 0),
                              heads=(2, 2), layers=1, context_dim=8, vector_dim=None, groups=4))
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    settings = {"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 2}, "unet.use_rslora": False}
    lora.save(lora.LoRA(network).new(2), path, metadata={
        "lora_adapter_metadata": dumped(data.draw(damaged(settings)))})
    tensors = dict(safetensors.load_file(path))
    for _ in range(data.draw(st.integers(0, 2))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        tensors[key] = data.draw(TENSORS).clone()
    if data.draw(st.booleans()):
        safetensors.save_file(tensors, path, {"lora_adapter_metadata": dumped(
            data.draw(damaged(settings)))})
    path.write_bytes(data.draw(torn(path.read_bytes())))
    found, line = told(lambda: lora.load(path, {"unet": network}))
    if found is None:
        assert "fuzz.safetensors" in line
    else:
        assert all(x.isfinite().all() for pair in found["unet"].values() for x in pair)
        lora.merge(network, found["unet"])
    state, line = told(lambda: read_tensors(path))
    assert line if state is None else all(map(torch.is_tensor, state.values()))


# ---- flags

def flags_of(*parts):
    return [f"--{f.name.replace('_', '-')}" for part in parts for f in fields(part)]


def arguments(names):
    values = st.sampled_from(["", " ", "nan", "-inf", "1e999", "-1", "0", "1", "0.5", "yes", "x",
                              "cpu", "cpo", "dpo", "noisy", "constant", "none", "1e-400", "²", "٣",
                              str(2 ** 63), str(2 ** 64), "9" * 5000, "a\nb", "\ud800", "base",
                              "x_kohya", "../x", "-", "--", "Level=nan", "Level=1", "1_0", " 7"])
    return st.lists(st.tuples(st.sampled_from(names), st.lists(values, max_size=2)),
                    max_size=4).map(lambda some: [word for name, words in some
                                                  for word in (name, *words)])


def one_line_or(result, capsys):
    """result(), or None where the program ended in one line that names a flag or a cure."""
    capsys.readouterr()
    try:
        return result()
    except SystemExit as ended:
        said = capsys.readouterr()
        assert ended.code == 2 and said.err.count("\n") == 1 and said.err.startswith("error: ")
        assert said.err[:-1].isprintable() and len(said.err) < 2200 and not said.out
        return None


def sound(values):
    """Flags that were taken: finite numbers, seeds of torch, and no text that says nothing."""
    for name, value in values.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, float):
                assert np.isfinite(one), name
            if isinstance(one, str) and name != "caption":
                assert one.strip(), name
            if name in ("caption", "positive", "negative", "axis"):
                assert one is None or is_text(one), name
    assert 0 <= values["seed"] < 2 ** 63
    torch.Generator().manual_seed(values["seed"])


@fuzz(100)
@given(argv=arguments(flags_of(TOY.common, TOY.sft, TOY.cpo, TOY.report, TOY.weights)
                      + ["--quick", "--nonsense"]))
def test_flags_of_training_make_sense_or_are_named(capsys, argv):
    parts = "common", "sft", "cpo", "report"
    made = one_line_or(lambda: parse_training("a test", argv + ["--device", "cpu"], parts), capsys)
    if made:
        sound(flat(made))
        filled = made.cpo.filled()
        assert filled.stabilizer is not None and filled.paint >= 0 and made.common.batch > 0
        assert made.report.samples != 1 and made.cpo.name not in ("base", "x_kohya", "../x")


@fuzz(100)
@given(argv=arguments(flags_of(SAMPLING["toy"], TOY.weights) + ["--prompt"]))
def test_flags_of_sampling_make_sense_or_are_named(capsys, argv):
    made = one_line_or(lambda: parse_sampling("a test", argv + ["--device", "cpu"]), capsys)
    if made:
        sound(asdict(made[0]))
        assert 0 <= made[0].eta <= 1 and made[0].steps > 0 and made[0].count > 0


@fuzz(60)
@given(words=st.lists(WORDS.filter(is_text) | st.text(max_size=12), max_size=5))
def test_a_prompt_of_any_text_is_encoded(tokenizer, words):
    """All but halves of surrogate pairs, which have no bytes: flags and files refuse them."""
    made = Tokenizer.load(tokenizer[0])
    for text in (str(Prompt(" ".join(words), tuple(words))), *words):
        ids = made(text)
        assert len(ids) == 77 and max(ids) < len(made.vocabulary)
