"""The annotation page: what goes in comes out, no text can break it, and a real browser can work
with it where there is one."""
import html.parser
import json
import os
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest
from PIL import Image

from nanocpo.criteria import Criteria
from nanocpo.folder.annotate import collect, main, page
from nanocpo.folder.reading import DataError, from_folder
from nanocpo.toy.export import export
from nanocpo.toy.paintings import from_painter

TREE = {"name": "T", "children": [
    {"name": "A", "children": [
        {"name": "One", "positive": "good one", "negative": "bad one"},
        {"name": "Two", "positive": "good </script><b>", "negative": "bad & \"two\""}]},
    {"name": "Three", "positive": "good three", "negative": "bad three"}]}


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b c#1.jpg", "sub/d.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), "teal").save(tmp_path / name)
    (tmp_path / "criteria.json").write_text(json.dumps(TREE))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({
        "file_name": "b c#1.jpg", "caption": "x </script><script>alert(1)</script> <!-- é",
        "positive": ["good one"], "negative": ["Two"], "artist": "me"}) + "\n\n")
    return tmp_path


class Scripts(html.parser.HTMLParser):
    """The contents of the page's scripts as a browser cuts them, and all attributes that would load
    something."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.inside, self.loads = [], False, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag == "script"
        self.scripts += [""] * self.inside
        self.loads += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def test_the_page_holds_the_data_whatever_they_say(folder):
    path = main([str(folder)])
    assert path == folder / "annotate.html"
    parsed = Scripts(path.read_text(encoding="utf-8"))
    # the data, the program; nothing from elsewhere
    assert len(parsed.scripts) == 2 and parsed.loads == []
    data = json.loads(parsed.scripts[0])
    assert data["tree"] == TREE
    assert [row["file_name"] for row in data["rows"]] == ["a.png", "b c#1.jpg", "sub/d.PNG"]
    assert data["rows"][1]["src"] == "b%20c%231.jpg"
    assert data["rows"][1]["caption"] == "x </script><script>alert(1)</script> <!-- é"
    assert (data["rows"][1]["states"] == {"One": 1, "Two": -1, "Three": 0}
            and data["rows"][1]["other"] == ['"artist": "me"'])
    assert data["rows"][0]["caption"] == "" and set(data["rows"][0]["states"].values()) == {0}
    assert "<" not in parsed.scripts[0]


def test_a_changed_line_is_told_from_an_old_one(folder):
    criteria = Criteria.load(folder / "criteria.json")
    before = [row["was"] for row in collect(folder, criteria)]
    assert [row["was"] for row in collect(folder, criteria)] == before
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": "b c#1.jpg", "caption": "other"}))
    after = [row["was"] for row in collect(folder, criteria)]
    assert after[1] != before[1] and after[0] == before[0]


@pytest.mark.parametrize("line, words", [
    ("{", "line 2"), ('{"file_name": "a.png", "positive": ["nonsense"]}', "line 2: .*nonsense"),
    ('{"caption": "x"}', "line 2"), ("[]", "line 2"),
    ('{"file_name": "a.png"}\n{"file_name": "a.png"}', "line 3: a.png has a line already"),
    ('{"file_name": "gone.png"}', "gone.png is no picture"),
    ('{"file_name": "a.png", "postive": ["good one"]}', "line 2: 'postive' looks like 'pos"),
    ('{"file_name": ["a.png"]}', "line 2: 'file_name' is missing"), ("null", "line 2: not"),
    ('{"file_name": "../a.png"}', r"line 2: '../a.png' is no file of this folder"),
    ('{"file_name": "a.png", "caption": ["x"]}', "line 2: 'caption' is no string"),
    ('{"file_name": "a.png", "x": ' + "[" * 9999, "line 2: not JSON that can be read"),
    ('{"file_name": "a.png", "x": 1, "x": 2}', "line 2: 'x' stands there twice"),
    ('{"file_name": "a.png", "caption": "\\ud83d"}', "line 2: '.ud83d' holds half a character")])
def test_lines_that_the_page_would_lose_stop_it(folder, line, words):
    with open(folder / "metadata.jsonl", "w") as file:
        file.write("\n" + line + "\n")
    with pytest.raises(DataError, match=words):
        page(folder, Criteria.load(folder / "criteria.json"))


def test_pictures_that_browsers_do_not_show_are_named(folder, capsys):
    for name in ("scan.TIF", "phone.heic"):
        (folder / name).write_bytes(b"")
    main([str(folder)])
    assert ("left out, since not every browser shows such files: phone.heic, scan.TIF; "
            "save them as PNG" in capsys.readouterr().out)


def test_captions_of_other_programs_are_taken_over(folder):
    """A .txt beside the picture, `text` in the line, and without lines metadata.csv."""
    criteria = Criteria.load(folder / "criteria.json")
    (folder / "a.txt").write_text("from the side\n")
    (folder / "metadata.jsonl").write_text(json.dumps(
        {"file_name": "sub\\d.PNG", "text": "from the line", "artist": "me"}))
    rows = collect(folder, criteria)
    assert [row["caption"] for row in rows] == ["from the side", "", "from the line"]
    # what the page saves has one caption
    assert rows[2]["other"] == ['"artist": "me"']
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,text\nsub/d.PNG,"a, b"\n', encoding="utf-8")
    assert [row["caption"] for row in collect(folder, criteria)] == ["from the side", "", "a, b"]


def test_what_training_refuses_is_not_offered(folder, tmp_path_factory, capsys):
    """Links out of the folder, pipes, names that are not UTF-8."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x.png"
    Image.new("RGB", (4, 4)).save(elsewhere)
    (folder / "link.png").symlink_to(elsewhere)
    (folder / "inside.png").symlink_to(folder / "a.png")
    os.mkfifo(folder / "pipe.png")
    bad = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")
    try:
        Image.new("RGB", (4, 4)).save(bad)
    except OSError:                                     # a system whose names are all UTF-8
        bad = None
    (folder / "metadata.jsonl").unlink()
    main([str(folder)])
    said = capsys.readouterr().out
    rows = json.loads(Scripts((folder / "annotate.html").read_text(encoding="utf-8")).scripts[0])
    assert [row["file_name"] for row in rows["rows"]] == ["a.png", "b c#1.jpg", "inside.png",
                                                          "sub/d.PNG"]
    assert ("left out, since they are links out of the folder: link.png; copy the pictures into it"
            in said)
    assert bad is None or "since their names are not UTF-8: caf\\udce9.png; rename them" in said


@pytest.mark.parametrize("content, words", [
    (b"file_name,text\n\xff,x\n", "metadata.csv: is not UTF-8 .*byte 15"),
    (b"file_name,text,caption\na.png,x,y\n", "csv, near line 2: 'caption' and 'text' are"),
    (b"file_name,text\na.png," + b"x" * 200_000, "csv, near line 1: field larger than field")])
def test_a_table_that_cannot_be_read_is_named(folder, content, words):
    (folder / "metadata.csv").write_bytes(content)
    with pytest.raises((DataError, ValueError), match=words):
        main([str(folder)])


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "criteria.json"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises((OSError, ValueError), match=f"{name}: a named pipe or a device"):
        main([str(folder)])


def test_the_page_replaces_itself_whole(folder):
    """Whatever stands under its name: nothing is waited for, nothing elsewhere is written."""
    other = folder / "other.txt"
    other.write_text("mine")
    (folder / "annotate.html").symlink_to(other)
    main([str(folder)])
    assert other.read_text() == "mine" and not (folder / "annotate.html").is_symlink()
    (folder / "annotate.html").unlink()
    os.mkfifo(folder / "annotate.html")
    main([str(folder)])
    assert "<html" in (folder / "annotate.html").read_text(encoding="utf-8")


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no picture in it"):
        main([str(tmp_path)])


def test_the_painters_export_opens(tmp_path):
    data = from_painter(count=3)
    export(data, tmp_path)
    rows = collect(tmp_path, data.criteria)
    assert ([list(row["states"].values()) for row in rows] == data.annotations.tolist()
            and [row["caption"] for row in rows] == data.captions)


BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NODE = shutil.which("node")
# run in the page after it: press keys and click as a person would, then put what would be saved
# where the test can read it
PROBE = """
const press = (key) => document.onkeydown({ key, preventDefault() {} });
const click = (i, share) => { const box = leaves[i].box; \
box.onclick({ clientX: box.getBoundingClientRect().left + share * box.offsetWidth }); };
const open_at = picture;
const before = { progress: document.getElementById("count").textContent, metadata: metadata(), \
shown: document.getElementById("where").textContent };
const image = document.getElementById("picture"), \
rendering = [[32, 400, 400], [300, 400, 400], [300, 900, 400]].map(
  ([natural, width, height]) => {
    for (const [name, value] of Object.entries({ naturalWidth: natural, naturalHeight: natural, \
clientWidth: width, clientHeight: height }))
      Object.defineProperty(image, name, { value, configurable: true });
    image.onload();
    return image.style.imageRendering;
  });
ACTIONS
const looks = leaves.map((l) => [l.box.className, l.box.children[1].textContent, l.box.title]), \
counts = document.getElementById("count").textContent;
document.body.innerHTML = "<pre id=result></pre>";
document.getElementById("result").textContent = encodeURIComponent(JSON.stringify({ before, \
after: metadata(), kept: localStorage.getItem(key), picture, open_at, rendering, looks, counts, \
said: globalThis.said }));
"""
# as much of a browser as the page needs, for machines with node only: it draws nothing
STUB = """
const fs = require("fs"), made = {}, \
storage = fs.existsSync(STORAGE) ? JSON.parse(fs.readFileSync(STORAGE)) : {};
const Element = () => ({ children: [], style: {}, value: "", textContent: "", \
append(e) { this.children.push(e); }, blur() {}, focus() {}, offsetWidth: 100,
  getBoundingClientRect: () => ({ left: 40 }), getAttribute() { return this.src; }, \
querySelector: () => ({ scrollIntoView() {} }) });
globalThis.document = { body: {}, createElement: Element, \
getElementById: (id) => made[id] ??= Element() };
globalThis.localStorage = { getItem: (key) => storage[key] ?? null, \
setItem: (key, value) => { storage[key] = value; } };
document.getElementById("data").textContent = DATA;
PAGE
fs.writeFileSync(STORAGE, JSON.stringify(storage));
console.log(made.result.textContent);
"""


def in_browser(folder, actions, profile):
    """Open the page in a headless browser, from file:// and without a network, with PROBE
    at its end."""
    text = (folder / "annotate.html").read_text(encoding="utf-8")
    probe = f"<script>{PROBE.replace('ACTIONS', actions)}</script></html>"
    (folder / "probe.html").write_text(text.replace("</html>", probe), encoding="utf-8")
    out = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu",
                          "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
                          "--disable-background-networking", f"--user-data-dir={profile}",
                          "--dump-dom", (folder / "probe.html").as_uri()],
                         capture_output=True, text=True, timeout=600)
    found = re.search(r'<pre id="result">(.*?)</pre>', out.stdout)
    assert found, out.stdout[-500:] + out.stderr[-500:]
    return json.loads(unquote(found[1]))


def in_node(folder, actions, profile):
    """The same without a browser: the page's script on STUB."""
    data, script = Scripts((folder / "annotate.html").read_text(encoding="utf-8")).scripts
    for word, text in (("PAGE", script + PROBE.replace("ACTIONS", actions)),
                       ("DATA", json.dumps(data)), ("STORAGE", json.dumps(f"{profile}/storage"))):
        script = (STUB if word == "PAGE" else script).replace(word, text)
    (profile / "probe.js").write_text(script, encoding="utf-8")
    out = subprocess.run([NODE, profile / "probe.js"], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr[-2000:]
    return json.loads(unquote(out.stdout))


IN_BROWSERS = pytest.mark.parametrize("run", [
    pytest.param(in_browser, marks=pytest.mark.skipif(
        BROWSER is None, reason="no Chromium on this machine")),
    pytest.param(in_node, marks=pytest.mark.skipif(
        NODE is None, reason="no node on this machine"))])


@IN_BROWSERS
def test_what_the_page_does_not_understand_it_keeps_byte_for_byte(folder, tmp_path_factory, run):
    """Numbers that JavaScript rounds or does not know, escapes, the order of keys; and a line with
    such keys that has no caption."""
    odd = ['"id": 18446744073709551617', '"score": NaN', '"w": 1.00', '"src": [ ]', '"was": 1',
           r'"caf\u00e9": {"b": [1e400, "\u0041"], "a": "</script>"}', '"__proto__": {"x": 1}']
    line = '{"file_name": "b c#1.jpg", "caption": "x", "positive": ["One"], %s}' % ", ".join(odd)
    (folder / "metadata.jsonl").write_text(line + '\n{"file_name": "a.png", "n": -0.0}\n')
    main([str(folder)])
    saved = run(folder, 'press("ArrowRight"); press("n");', tmp_path_factory.mktemp("p"))["after"]
    first, second = saved.splitlines()
    assert first == '{"file_name":"a.png","caption":"","positive":[],"negative":[],"n": -0.0}'
    assert second == ('{"file_name":"b c#1.jpg","caption":"x","positive":[],"negative":["bad one"],'
                      + ",".join(odd) + "}")


@IN_BROWSERS
def test_annotating(folder, tmp_path_factory, run):
    main([str(folder)])
    profile = tmp_path_factory.mktemp("profile")
    got = run(folder, """
        press("+"); press("ArrowDown"); press("-"); press("ArrowDown"); press("p"); press("u");
        document.getElementById("caption").value = "first <\\/script>"; """
              """document.getElementById("caption").oninput();
        press("ArrowRight"); press("0"); press("ArrowRight"); press("n"); press("ArrowUp"); """
              """click(2, 0.1); click(1, 0.9); click(1, 0.5);
    """, profile)
    # 32 pixels enlarged to 400; 300; 300 in a broad window
    assert got["rendering"] == ["pixelated", "auto", "auto"]
    assert (got["before"]["progress"] == "1 of 3 done"
            and got["before"]["shown"].startswith("1 / 3") and got["picture"] == 2)
    original = (folder / "metadata.jsonl").read_text()
    # untouched: what was read
    assert (json.loads(got["before"]["metadata"])
            == json.loads(original) | {"negative": ["bad & \"two\""]})
    lines = [json.loads(line) for line in got["after"].splitlines()]
    # the third has no caption yet
    assert lines == [{"file_name": "a.png", "caption": "first </script>", "positive": ["good one"],
                      "negative": ["bad & \"two\""]},
                     {"file_name": "b c#1.jpg",
                      "caption": "x </script><script>alert(1)</script> <!-- é", "positive": [],
                      "negative": ["bad & \"two\""], "artist": "me"}]
    again = run(folder, "", profile)  # reopening continues, the third picture's judgement too
    assert (again["before"]["metadata"] == got["after"]
            and json.loads(again["kept"])["sub/d.PNG"]["states"]
            == {"One": -1, "Two": 0, "Three": 1})
    # the third picture has no caption yet: there it goes on
    assert (got["open_at"], again["open_at"]) == (0, 2)
    (folder / "metadata.jsonl").write_text(got["after"], encoding="utf-8")
    data = from_folder(folder, size=8)  # what it saves, the training scripts read
    assert (data.captions == ["first </script>", lines[1]["caption"]]
            and data.annotations.tolist() == [[1, -1, 0], [0, -1, 0]])
    tree = TREE | {"children": TREE["children"] + [
        {"name": "Four", "positive": "good four", "negative": "bad four"}]}
    # a new leaf: what the browser kept is still there
    (folder / "criteria.json").write_text(json.dumps(tree))
    (folder / "metadata.jsonl").write_text(original, encoding="utf-8")
    main([str(folder)])
    assert run(folder, "", profile)["before"]["metadata"] == got["after"]
    (folder / "metadata.jsonl").write_text(
        json.dumps({"file_name": "b c#1.jpg", "caption": "changed since"}), encoding="utf-8")
    main([str(folder)])  # a line that was changed elsewhere wins
    assert ([json.loads(line)["caption"]
             for line in run(folder, "", profile)["before"]["metadata"].splitlines()]
            == ["first </script>", "changed since"])
    (folder / "criteria.json").write_text(json.dumps(TREE))
    (folder / "metadata.jsonl").write_text(got["after"], encoding="utf-8")
    main([str(folder)])  # and a page made from it says the same, in a fresh browser
    assert run(folder, "", tmp_path_factory.mktemp("fresh"))["before"]["metadata"] == got["after"]


@IN_BROWSERS
def test_saving_asks_only_where_verdicts_would_be_lost(folder, tmp_path_factory, run):
    """A picture that is judged and has no caption is left out of the file; one with a caption, one
    without verdicts and one with keys of another program lose nothing."""
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "x"}\n'
                                           '{"file_name": "b c#1.jpg", "id": 7}\n')
    main([str(folder)])
    said = run(folder, """
        globalThis.said = [];
        let answer = false;
        globalThis.confirm = (words) => { said.push(words); return answer; };
        globalThis.Blob = function (parts, how) { said.push([parts, how]); };
        URL.createObjectURL = () => "blob:1";
        const create = document.createElement;
        document.createElement = (name) => (
          { click() { said.push([name, this.href, this.download]); } });
        press("n"); press("ArrowRight"); press("p"); save();
        said.push("---"); press("ArrowRight"); press("n"); save();
        said.push("---"); answer = true; document.getElementById("save").onclick();
        document.createElement = create;
    """, tmp_path_factory.mktemp("p"))["said"]
    file = ['{"file_name":"a.png","caption":"x","positive":[],"negative":["bad one"]}\n'
            '{"file_name":"b c#1.jpg","caption":"","positive":["good one"],"negative":[],"id": 7}'
            '\n']
    saved = [[file, {"type": "application/jsonl"}], ["a", "blob:1", "metadata.jsonl"]]
    question = "1 judged pictures have no caption and are left out (first: sub/d.PNG). Save?"
    assert said == [*saved, "---", question, "---", question, *saved]


@IN_BROWSERS
def test_while_a_caption_is_typed_letters_are_text(folder, tmp_path_factory, run):
    """n and p are no verdicts there; Enter and Escape leave the field; Ctrl and a button's Enter
    are the browser's."""
    main([str(folder)])
    said = run(folder, """
        globalThis.said = [];
        const field = document.getElementById("caption"), verdict = () => rows[picture].states[
          leaves[leaf].name];
        let active = field;
        Object.defineProperty(document, "activeElement", { get: () => active, configurable: true });
        field.blur = () => said.push("left");
        const first = verdict(), at = picture;
        for (const key of ["n", "p", "ArrowRight", "x", "Enter", "Escape"]) {
          press(key);
          said.push([key, verdict() === first, picture === at]);
        }
        active = { tagName: "BUTTON" };
        press("Enter");
        said.push(["a button", verdict() === first, picture === at]);
        active = { tagName: "BODY" };
        for (const held of ["ctrlKey", "metaKey", "altKey"])
          document.onkeydown({ key: "ArrowRight", [held]: true, preventDefault() {} });
        said.push(["held", verdict() === first, picture === at]);
        press("ArrowRight");
        said.push(["free", picture === at + 1]);
    """, tmp_path_factory.mktemp("p"))["said"]
    assert said == [["n", True, True], ["p", True, True], ["ArrowRight", True, True],
                    ["x", True, True], "left", ["Enter", True, True], "left",
                    ["Escape", True, True], ["a button", True, True], ["held", True, True],
                    "left", ["free", True]]


def propose(folder, **proposed):
    """proposals.json with {file name: (positive, negative)}."""
    content = {"agreement": {"verdicts": 20, "share": 0.9}, "rows": [
        {"file_name": name, "positive": good, "negative": bad,
         "sure": {"One": 0.25, "Two": 0.5, "Three": 0.987}} for name, (good, bad) in
        proposed.items()]}
    (folder / "proposals.json").write_text(json.dumps(content))
    main([str(folder)])


@IN_BROWSERS
def test_proposals_are_no_verdicts_until_a_key_confirms_them(folder, tmp_path_factory, run):
    pictures = {"a.png": (["good one"], ["bad three"]), "sub/d.PNG": (["Three"], ["Two"]),
                "b c#1.jpg": ([], ["One", "Three"]), "gone.png": (["One"], [])}
    propose(folder, **pictures)
    profile = tmp_path_factory.mktemp("profile")

    def lines(got):
        return {row["file_name"]: (row["positive"], row["negative"])
                for row in map(json.loads, got["after"].splitlines())}
    # a caption makes a.png a line, its open proposals no part of it
    caption = """document.getElementById("caption").value = "x"; \
document.getElementById("caption").oninput();"""
    got = run(folder, caption, profile)
    assert lines(got) == {"a.png": ([], []), "b c#1.jpg": (["good one"], ['bad & "two"'])}
    assert got["counts"] == "1 of 3 done, 3 with proposals"
    assert got["looks"] == [
        ["leaf here maybe maybe-good", "+ ?", "proposed; surer than 25 % of the pictures"],
        ["leaf", "·", ""], ["leaf maybe maybe-bad", "− ?",
                            "proposed; surer than 99 % of the pictures"]]
    # y confirms the one leaf, and where nothing is proposed it does nothing
    got = run(folder, 'press("ArrowDown"); press("y"); press("ArrowDown"); press("y");', profile)
    assert lines(got)["a.png"] == ([], ["bad three"])
    assert [look[0] for look in got["looks"]] == ["leaf maybe maybe-good", "leaf",
                                                  "leaf here negative"]
    # the other verdict overrules a proposal, 0 refuses it, and a leaves both alone; it confirms the
    # rest of this picture, no other's
    got = run(folder, """press("ArrowLeft"); press("ArrowLeft");
        press("-"); press("ArrowRight"); press("a"); press("ArrowRight");
        press("ArrowDown"); press("0"); press("a");""" + caption, profile)
    assert lines(got) == {"a.png": ([], ["bad one", "bad three"]),
                          "b c#1.jpg": (["good one"], ['bad & "two"', "bad three"]),
                          "sub/d.PNG": (["good three"], [])}
    assert got["looks"][1][:2] == ["leaf here", "·"] and got["counts"] == "3 of 3 done"
    # what was refused stays refused
    again = run(folder, 'press("ArrowRight"); press("ArrowRight"); press("a");', profile)
    assert again["counts"] == "3 of 3 done" and again["before"]["metadata"] == got["after"]
    assert lines(again) == lines(got)
    # what was saved, with nothing of the browser's, is the same data; and what is judged has no
    # proposal any more
    (folder / "metadata.jsonl").write_text(got["after"], encoding="utf-8")
    propose(folder, **pictures)
    fresh = run(folder, "", tmp_path_factory.mktemp("fresh"))
    assert fresh["counts"] == "3 of 3 done, 1 with proposals"      # the one that was refused there
    assert from_folder(folder, size=8).annotations.tolist() == [[-1, 0, -1], [1, -1, -1], [0, 0, 1]]


@IN_BROWSERS
def test_without_proposals_the_page_is_as_it_was(folder, tmp_path_factory, run):
    main([str(folder)])
    got = run(folder, 'press("y"); press("a");', tmp_path_factory.mktemp("profile"))
    assert got["counts"] == "1 of 3 done" and got["kept"] is None
    assert {look[1] for look in got["looks"]} == {"·"} and got["before"]["metadata"] == got["after"]
