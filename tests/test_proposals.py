"""The auxiliary's proposals for unjudged pictures: made by folder/propose.py, checked against the
verdicts of held-out pictures, and never taken for verdicts."""
import json

import numpy as np
import pytest
import torch

import sd_tiny
from toy_tiny import CRITERIA, DATA, tiny_model

from nanocpo.criteria import DEFAULT_TREE
from nanocpo.folder import proposals, propose
from nanocpo.folder.annotate import collect, page
from nanocpo.folder.expert import agreement, calibrate, held_out, in_context, told
from nanocpo.folder.proposals import FILE, read, unjudged
from nanocpo.folder.reading import DataError, from_folder
from nanocpo.run.flags import parse_sampling
from nanocpo.run.settings import PROPOSING, Weights
from nanocpo.sd import lora, world
from nanocpo.toy.export import export
from nanocpo.utils.checkpoint import save_checkpoint

MODEL = tiny_model()
OPEN = range(20, 24)                        # pictures that nobody judged; 8, 9, 18, 19 are held out


@pytest.fixture
def folder(tmp_path):
    """Twenty judged pictures, two listed without a verdict, two not listed; and a checkpoint."""
    export(DATA.take(range(24)), tmp_path / "pictures")
    listing = tmp_path / "pictures" / "metadata.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()][:22]
    rows[21] |= {"caption": "a shed"}       # which the model does not know
    silent = {"positive": [], "negative": []}
    rows[20:] = [row | silent for row in rows[20:]]
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(tmp_path, None)
    return tmp_path / "pictures"


def save(place, data):
    """The checkpoint: an auxiliary that was trained on data of this digest."""
    save_checkpoint(place / "auxiliary.pt", MODEL.content() | {
        "ema": MODEL.state_dict(), "made_of": {"data": data}, "step": 1, "steps": 1})


def run(folder, *more):
    return propose.main(["--data", str(folder), "--checkpoint",
                         str(folder.parent / "auxiliary.pt"), "--device", "cpu", "--draws", "1",
                         "--rounds", "2", *more])


def opened(weights, *files):
    """settings.Weights with tiny weights, and an adapter's file."""
    return Weights(str(weights), list(files) or None, resolution=64, bucket_step=16)


def names(numbers):
    return [f"{i:06d}.png" for i in numbers]


def test_the_unjudged_get_proposals_and_the_judged_say_how_good_they_are(folder, capsys):
    before, listing = from_folder(folder), (folder / "metadata.jsonl").read_bytes()
    got = run(folder, "--seed", "3", "--known", "3")
    assert got == json.loads((folder / FILE).read_text()) | {"rows": got["rows"]}
    assert [row["file_name"] for row in got["rows"]] == names(OPEN)
    # by hand: where the three first held-out pictures cut, and which side that is
    held = DATA.take([8, 9, 18])
    scores = in_context(MODEL, held, 1, 2, seed=3)
    known = agreement(scores, held.annotations, CRITERIA)
    assert got["agreement"] == known and 0 < known["verdicts"] <= 3 * len(CRITERIA)
    asked = DATA.take(OPEN)
    asked.captions[1:] = ["", "", ""]       # unknown to the model, or not said
    beyond = in_context(MODEL, asked, 1, 2, seed=3) - calibrate(scores, held.annotations)
    found, sentence = read(folder, CRITERIA)
    sides = [[found[name][leaf.name][0] for leaf in CRITERIA.leaves] for name in names(OPEN)]
    assert sides == np.where(beyond > 0, 1, -1).tolist() and {1, -1} == set(np.ravel(sides))
    sure = [[found[name][leaf.name][1] for leaf in CRITERIA.leaves] for name in names(OPEN)]
    # the share of the four that are less sure: 0, 1/4, 1/2 and 3/4, the farthest from the cut last
    assert (np.sort(sure, 0) == np.array([[0, 0.25, 0.5, 0.75]]).T).all()
    assert (np.argmax(sure, 0) == np.argmax(abs(beyond), 0)).all()
    out = capsys.readouterr().out
    assert sentence == told(got["agreement"]) == (
        f"Of {known['verdicts']} verdicts on held-out pictures the auxiliary gives "
        f"{100 * known['share']:.0f} % as the person did.") and sentence in out
    assert "1 of 4 captions are unknown to the auxiliary" in out
    # no verdict came into being
    after = from_folder(folder)
    assert (folder / "metadata.jsonl").read_bytes() == listing
    assert after.digest() == before.digest()
    states = {row["file_name"]: row["states"] for row in collect(folder, CRITERIA)}
    assert not any(any(states[name].values()) for name in names(OPEN))


def test_what_the_auxiliary_may_have_seen_is_said(folder, capsys):
    words = "was not trained on this folder as it is now"
    run(folder)
    assert words in capsys.readouterr().out
    save(folder.parent, from_folder(folder).digest())
    run(folder)
    assert words not in capsys.readouterr().out
    run(folder, "--known", "0")             # nothing is compared, and nothing asked
    got = json.loads((folder / FILE).read_text())
    assert got["agreement"]["verdicts"] == 0 and got["agreement"]["share"] is None
    assert "No verdict was there to check the auxiliary by." in capsys.readouterr().out
    (folder / "metadata.jsonl").unlink()    # an auxiliary from elsewhere, nothing judged yet
    assert len(run(folder)["rows"]) == 24 and "No verdict" in capsys.readouterr().out


def test_leaves_that_are_judged_stay_as_they_are(folder, monkeypatch):
    """--partly: about the other leaves, beside those that are known."""
    rows, asked = collect(folder, CRITERIA), []
    missing = [i for i, row in enumerate(rows) if 0 in row["states"].values()]
    assert set(OPEN) < set(missing) and len(missing) < 24
    assert [row["file_name"] for row in unjudged(rows)] == names(OPEN)
    real = proposals.in_context
    monkeypatch.setattr(proposals, "in_context", lambda *a, known=None, **more: (
        asked.append(known) or real(*a, known=known, **more)))
    got = run(folder, "--partly", "--known", "2")
    assert [row["file_name"] for row in got["rows"]] == names(missing)
    states = np.array([list(rows[i]["states"].values()) for i in missing])
    assert asked[0] is None and (asked[1] == states).all() and asked[1].dtype == np.int8
    for row, known in zip(got["rows"], states):
        proposed = CRITERIA.annotation(row["positive"], row["negative"])
        assert ((proposed == 0) == (known != 0)).all()
        assert list(row["sure"]) == [leaf.name for leaf, a in zip(CRITERIA.leaves, known) if a == 0]
    full = [row for row in rows if all(row["states"].values())]
    with pytest.raises(DataError, match="every picture has a verdict already; --partly asks"):
        unjudged(full)
    with pytest.raises(DataError, match="on every leaf; there is nothing to propose"):
        unjudged(full, partly=True)


def test_the_page_shows_them_apart_from_verdicts(folder):
    run(folder)
    text = page(folder, CRITERIA)
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    found, sentence = read(folder, CRITERIA)
    assert data["told"] == sentence and len(found) == 4
    for row in data["rows"]:
        assert row["proposed"] == {k: list(v) for k, v in found.get(row["file_name"], {}).items()}
    # a line is told from an old one by what was judged alone
    was = [row["was"] for row in data["rows"]]
    (folder / FILE).unlink()
    assert was == [row["was"] for row in collect(folder, CRITERIA)]
    assert read(folder, CRITERIA) == ({}, "")


@pytest.mark.parametrize("text, words", [
    ("{", "Expecting"), ("[]", "list indices"), ('{"rows": [{}]}', "'positive'"),
    ('{"rows": [{"positive": ["nonsense"], "negative": []}]}', "unknown attribute 'nonsense'"),
    ('{"rows": [{"positive": ["level horizon"], "negative": [], "file_name": "a"}]}', "'sure'"),
    ('{"rows": [{"positive": [], "negative": ["tilted horizon"], "file_name": "a", '
     '"sure": {"Level": NaN}}]}', "a: how sure is a share from 0 to 1"),
    ('{"rows": []}', "'agreement'")])
def test_a_file_that_fits_no_more_is_told(folder, text, words):
    (folder / FILE).write_text(text)
    with pytest.raises(DataError, match=f"{FILE}: these are no proposals for this tree .*{words}"
                                        ".*; delete the file, or have propose.py write it"):
        page(folder, CRITERIA)


def test_what_cannot_be_asked_is_told(folder, tmp_path, capsys):
    tree = json.loads((folder / "criteria.json").read_text())
    (folder / "criteria.json").write_text(json.dumps(tree | {"children": tree["children"][1:]}))
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="auxiliary.pt belongs to another run .tree.; name an "
                                         "auxiliary that was trained on this folder, or its"):
        run(folder)
    run(folder, "--tree", str(DEFAULT_TREE))
    for flags, words in (([], "--data : name the folder"),
                         (["--data", "nowhere"], "--data nowhere: name the folder"),
                         (["--data", str(folder), "--lora", "x"], "--lora needs --weights")):
        with pytest.raises(SystemExit):
            propose.main(flags)
        assert words in capsys.readouterr().err
    asked = [parse_sampling("", ["--data", str(folder), *more], PROPOSING)[0]
             for more in ([], ["--weights", "w"])]
    assert [how.batch for how in asked] == [32, 1]          # that of the training
    with pytest.raises(ValueError, match="--weights needs --lora: the auxiliary's adapter"):
        propose.main(["--data", str(folder), "--weights", "w"])


def test_stable_diffusion_proposes_for_pictures_of_any_shape(tmp_path, monkeypatch):
    pytest.importorskip("diffusers"), pytest.importorskip("safetensors")
    weights, folder, _ = sd_tiny.files(tmp_path)
    listing = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in listing.read_text().splitlines()]
    asked = sorted(row["file_name"] for row in rows[:4])
    listing.write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    model = world.open_base(opened(weights), "cpu")
    adapter = sd_tiny.moved(model.with_adapter(2)).adapter
    lora.save(adapter, tmp_path / "auxiliary.safetensors")
    got = propose.main(["--data", str(folder), "--weights", str(weights), "--lora",
                        str(tmp_path / "auxiliary.safetensors"), "--resolution", "64",
                        "--bucket-step", "16", "--device", "cpu", "--draws", "1", "--rounds", "2"])
    assert [row["file_name"] for row in got["rows"]] == asked
    assert all(len(row["sure"]) == len(CRITERIA) for row in got["rows"])
    # held out by content, as in training, whatever the place in the list
    how = parse_sampling("", ["--data", str(folder), "--weights", "w", "--device", "cpu"],
                         PROPOSING)[0]
    judge = world.StableDiffusionJudge(
        how, opened(weights, tmp_path / "auxiliary.safetensors"), CRITERIA)
    given = []
    with monkeypatch.context() as patched:          # an adapter of the text encoders is heeded too
        patched.setattr(world, "with_lora", lambda base, *files, **more: given.append(
            (files, more)))
        world.StableDiffusionJudge(how, opened(weights, "x.safetensors"), CRITERIA)
    assert given == [(("x.safetensors",), {"merge_text": True})]
    held = held_out(judge.pictures())
    assert got["agreement"]["verdicts"] == (held.annotations != 0).sum() > 0
    assert len({tuple(image.shape) for image in judge.pictures().images}) > 1
    with torch.no_grad():
        scores = in_context(judge.model, held, 1, 2, size=1)
    assert got["agreement"]["share"] == agreement(scores, held.annotations,
                                                        CRITERIA)["share"]
