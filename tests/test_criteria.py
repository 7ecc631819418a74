"""The tree of criteria: what the embedded one holds, how a branch is chosen, what a broken one is
told."""
import copy
import json

import numpy as np
import pytest

from nanocpo.criteria import Criteria, CriteriaError, Prompt

CRITERIA = Criteria.load()
LEAVES = ["Placement", "Level", "Height", "Harmony", "Purity", "Contrast", "Exposure", "Strokes",
          "Edges", "Gradation", "Spatter", "Corners"]


def leaf(name, **changes):
    return {"name": name, "positive": f"good {name}", "negative": f"bad {name}", **changes}


def branch(name, *children):
    return {"name": name, "children": list(children)}


# ---------------------------------------------------------------- the embedded tree

def test_embedded_tree_is_large_and_deep_enough():
    assert len(CRITERIA) == len(CRITERIA.leaves) >= 12 and len(CRITERIA.roots) >= 5
    assert ({"Composition", "Color Relations", "Brushstroke and Texture"}
            <= {root.name for root in CRITERIA.roots})
    # levels below the tree's own name
    assert all(len(node.path.split("/")) >= 3 for node in CRITERIA.leaves)
    assert all(node.positive and node.negative and not node.children for node in CRITERIA.leaves)


def test_leaf_order_is_the_order_of_the_file():
    # annotations on disk and checkpoints depend on it
    assert [node.name for node in CRITERIA.leaves] == LEAVES
    again = Criteria(json.loads(json.dumps(CRITERIA.to_dict())))
    assert again.leaves == CRITERIA.leaves and again.to_dict() == CRITERIA.to_dict()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # some editors put a mark at the start
def test_load_of_another_file(tmp_path, encoding):
    (tmp_path / "own.json").write_text(json.dumps(branch("T", leaf("Né")), ensure_ascii=False),
                                       encoding=encoding)
    assert [node.name for node in Criteria.load(tmp_path / "own.json").leaves] == ["Né"]


# ---------------------------------------------------------------- finding, choosing, printing

@pytest.mark.parametrize("name", ["Horizon", "Composition/Horizon"])
def test_find_by_name_and_path(name):
    node = CRITERIA.find(name)
    assert (node.name, node.path) == ("Horizon", "Composition/Horizon")
    assert ([n.name for n in node.leaves()] == ["Level", "Height"]
            and [n.name for n in node.walk()][0] == "Horizon")


def test_find_of_an_unknown_name_lists_what_there_is():
    with pytest.raises(CriteriaError, match="no dimension 'Mood'.*Composition.*Corners"):
        CRITERIA.find("Mood")


@pytest.mark.parametrize("names, columns", [
    ("Composition", [0, 1, 2]), ("Level", [1]), ("Finish/Surface", [10, 11]),
    ("Painting", list(range(len(CRITERIA)))), (None, list(range(len(CRITERIA)))), ([], []),
    (["Finish", "Composition/Horizon"], [1, 2, 10, 11]), (["Horizon", "Level", "Horizon"], [1, 2])])
def test_columns_are_in_the_order_of_the_leaves_and_occur_once(names, columns):
    assert CRITERIA.columns(names) == columns
    assert CRITERIA.columns(None) == list(range(len(CRITERIA)))


def test_select_keeps_the_branches_and_what_is_above_them():
    part = CRITERIA.select(["Finish", "Level"])
    paths = ["Composition/Horizon/Level", "Finish/Surface/Spatter", "Finish/Surface/Corners"]
    assert [node.path for node in part.leaves] == paths
    assert [root.name for root in part.roots] == ["Composition", "Finish"]
    assert part.leaves == tuple(CRITERIA.leaves[i] for i in CRITERIA.columns(["Finish", "Level"]))
    assert CRITERIA.select("Painting").to_dict() == CRITERIA.to_dict()
    assert [node.name for node in CRITERIA.leaves] == LEAVES      # the large tree is left as it was


def test_select_of_nothing_is_an_error():
    with pytest.raises(CriteriaError, match="no dimension was named"):
        CRITERIA.select([])


def test_prints_as_an_indented_tree():
    assert str(CRITERIA.select("Horizon")).splitlines() == [
        "Painting", "  Composition", "    Horizon", "      Level: level horizon / tilted horizon",
        "      Height: horizon on the lower third / horizon halving the picture"]
    assert len(str(CRITERIA).splitlines()) == sum(1 for _ in CRITERIA.tree.walk())


# ---------------------------------------------------------------- annotations and prompts

def test_annotation_takes_phrases_names_and_paths():
    states = CRITERIA.annotation(["level horizon", "Harmony"],
                                 ["too dark", "Finish/Surface/Corners"])
    expected = {"Level": 1, "Harmony": 1, "Exposure": -1, "Corners": -1}
    assert states.dtype == np.int8 and states.tolist() == [expected.get(x, 0) for x in LEAVES]
    assert not CRITERIA.annotation().any() and len(CRITERIA.annotation()) == len(LEAVES)
    # twice the same is no contradiction
    assert CRITERIA.annotation(["Level", "level horizon"]).tolist()[1] == 1


@pytest.mark.parametrize("positive, negative, message", [
    (["nice"], [], "unknown attribute 'nice'"),
    ([], ["Composition"], "unknown attribute 'Composition'"),          # a dimension is no attribute
    (["too dark"], [], "Light and Value/Tone/Exposure: 'too dark' is the other side's phrase"),
    ([], ["balanced light"],
     "Light and Value/Tone/Exposure: 'balanced light' is the other side's phrase"),
    (["level horizon"], ["tilted horizon"],
     "Horizon/Level: 'tilted horizon' is listed as positive and as negative"),
    (["Level"], ["Level"],
     "Composition/Horizon/Level: 'Level' is listed as positive and as negative"),
    ("too dark", [], "a list of strings, not 'too dark'"),
    ([], [3], r"a list of strings, not \[3\]"), (None, [], "a list of strings, not None"),
    ([], 3, "a list of strings, not 3"), ({"Level": 1}, [], "a list of strings, not {")])
def test_annotation_refuses(positive, negative, message):
    with pytest.raises(CriteriaError, match=message):
        CRITERIA.annotation(positive, negative)


def test_prompt_carries_the_phrases_of_both_sides():
    states = CRITERIA.annotation(["Level", "Spatter"], ["Edges", "Placement"])
    prompt = CRITERIA.prompt("a boat", states)
    assert prompt == Prompt("a boat", ("level horizon", "clean surface"),
                            ("subject dead centre", "blurred edges"))
    assert CRITERIA.annotation(prompt.positive, prompt.negative).tolist() == states.tolist()
    assert str(prompt) == ("a boat; good: level horizon, clean surface; "
                           "bad: subject dead centre, blurred edges")
    assert CRITERIA.prompt("a boat") == Prompt("a boat") and str(Prompt("a boat")) == "a boat"


@pytest.mark.parametrize("states", [
    [1, -1], [2] + [0] * (len(CRITERIA) - 1), [0.5] * len(CRITERIA),
    [float("nan")] * len(CRITERIA), [[0] * len(CRITERIA)], ["Level"] * len(CRITERIA)])
def test_prompt_refuses_what_is_no_annotation(states):
    with pytest.raises(CriteriaError, match=f"an annotation is {len(CRITERIA)} numbers of -1, "
                                            "0, .1"):
        CRITERIA.prompt("a boat", states)


# ---------------------------------------------------------------- broken trees

def in_tree(node):
    """A tree with one good leaf and `node` below A/B, so that the path in the message can be told
    from the name."""
    return branch("T", branch("A", leaf("Good"), branch("B", node)))


def test_in_tree_is_sound():
    assert [node.path for node in Criteria(in_tree(leaf("L"))).leaves] == ["A/Good", "A/B/L"]


@pytest.mark.parametrize("tree, message", [
    (in_tree(leaf("Good", positive="x", negative="y")),
     r"A/(Good|B/Good): the name 'Good' occurs twice"),
    (in_tree(leaf("A")), "A(/B/A)?: the name 'A' occurs twice"),
    (in_tree(leaf("T")), "T: the name 'T' occurs twice"),
    (in_tree(leaf("")), "below A/B: the name '' is empty"),
    (in_tree(leaf("  ")), "below A/B: the name '  ' is empty"),
    (in_tree(leaf("a/b")), "below A/B: the name 'a/b' is empty or contains '/'"),
    (in_tree(leaf(7)), "below A/B: the name 7"),
    (in_tree({"positive": "x", "negative": "y"}), "below A/B: the name None is empty"),
    (in_tree({"name": "L", "positive": "x"}), "A/B/L: the pair has no 'negative' phrase"),
    (in_tree({"name": "L", "negative": "x"}), "A/B/L: the pair has no 'positive' phrase"),
    (in_tree({"name": "L"}), "A/B/L: the pair has no 'positive' phrase"),
    (in_tree(leaf("L", positive=" ")), "A/B/L: the pair has no 'positive' phrase"),
    (in_tree(leaf("L", negative=["x"])), "A/B/L: the pair has no 'negative' phrase"),
    (in_tree(leaf("L", children=[leaf("M")])),
     r"A/B/L: a node has a name, and .*; remove \['negative', 'positive'\]"),
    (in_tree(branch("L")), "A/B/L: 'children' must be a list that is not empty"),
    (in_tree({"name": "L", "children": None}), "A/B/L: 'children' must be a list"),
    (in_tree({"name": "L", "children": {"M": 1}}), "A/B/L: 'children' must be a list"),
    (in_tree("L"), "below A/B: a node is an object with a 'name', not 'L'"),
    (in_tree(leaf("L", weight=2, why="x")), r"A/B/L: a node has .*; remove \['weight', 'why'\]"),
    (in_tree(leaf("L", **{"weight": 2}) | {3: 4}), r"A/B/L: a node has .*; remove \[3, 'weight'\]"),
    (in_tree(leaf("L", positive="good Good")), "A/B/L: 'good Good' already stands for A/Good"),
    (in_tree(leaf("L", negative="good L")), "A/B/L: 'good L' already stands for A/B/L"),
    # a phrase that is a leaf's name
    (in_tree(leaf("L", positive="Good")), "A/B/L: 'Good' already stands for A/Good"),
    ([leaf("L")], "below the top: a node is an object"),
    (None, "below the top: a node is an object"),
    (branch("", leaf("L")), "below the top: the name '' is empty"),
    ({**in_tree(leaf("L")), "x": 1}, r"^T: a node has .*; remove \['x'\]"),
    (leaf("L"), "'L' has no children: a tree needs at least one leaf")])
def test_bad_tree_names_the_path(tree, message):
    with pytest.raises(CriteriaError, match=message):
        Criteria(copy.deepcopy(tree))


@pytest.mark.parametrize("depth, message", [(0, "below A/B: 'T' contains itself"),
                                            (1, "below A/B: 'A' contains itself"),
                                            (2, "below A/B: 'B' contains itself")])
def test_tree_that_contains_itself(depth, message):
    tree = in_tree(leaf("L"))
    chain = [tree, tree["children"][0], tree["children"][0]["children"][1]]
    chain[2]["children"].append(chain[depth])    # JSON cannot do this; a dict made by a program can
    with pytest.raises(CriteriaError, match=message):
        Criteria(tree)


@pytest.mark.parametrize("content, message", [
    (None, "cannot read"), (b"", "cannot read"), (b"{'name': 'T'}", "cannot read"),
    (b'{"name": "\xff"}', "cannot read"),
    # RecursionError; more digits than int() takes
    (b"[" * 100_000, "cannot read"), (b"1" * 5000, "cannot read"),
    (b"[]", "below the top"), (json.dumps(in_tree(branch("L"))).encode(), "A/B/L: 'children'")])
def test_unreadable_tree_names_the_file(tmp_path, content, message):
    path = tmp_path / "own.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CriteriaError, match=f"own.json: .*{message}"):
        Criteria.load(path)


def test_folder_instead_of_a_tree_names_the_folder(tmp_path):
    with pytest.raises(CriteriaError, match=f"{tmp_path.name}: cannot read"):
        Criteria.load(tmp_path)
