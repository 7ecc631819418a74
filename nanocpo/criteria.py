"""The criteria: a tree of named dimensions whose leaves are attribute pairs,
and what follows from it: annotations and prompts.

The paper's tree (arXiv 2601.04300) was made by experts and is not public to us beyond three root
dimensions (Composition, Color Relations, Brushstroke and Texture). The tree in toy/paintings.json
is ours: small, and every leaf of it can be measured. An *annotation* is an int8 array with one
number per leaf: +1 (positive), -1 (negative), 0 (not judged).
"""
import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .utils.files import parse, read_text

DEFAULT_TREE = Path(__file__).parent / "toy" / "paintings.json"


class CriteriaError(ValueError):
    """A tree or an annotation that cannot be used;
    the message names the path in the tree and what to do."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked to paint: a caption, phrases it should show,
    phrases that are said to be wrong with it."""
    caption: str = ""
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()

    def __str__(self):
        sides = (("good", self.positive), ("bad", self.negative))
        return "; ".join([self.caption] + [f"{side}: {', '.join(phrases)}"
                                           for side, phrases in sides if phrases])


@dataclass(frozen=True)
class Node:
    """One dimension of the tree; a leaf has no children and carries a phrase for each side."""
    name: str
    path: str                   # "Composition/Horizon/Level"; the tree's own name is not part of it
    children: tuple["Node", ...] = ()
    positive: str = ""
    negative: str = ""

    def walk(self):
        """This node and everything below it, depth first, in the order of the file."""
        yield self
        for child in self.children:
            yield from child.walk()

    def leaves(self):
        """The leaves below this node (itself, if it is one)."""
        return tuple(node for node in self.walk() if not node.children)


class Criteria:
    """A checked tree. `leaves` fixes the order of every annotation;
    `roots` are the dimensions at the top."""

    def __init__(self, tree):
        """tree: a dict as in paintings.json.
        Raises CriteriaError with the path of the first fault."""
        self.tree, self._dict = _build(tree), copy.deepcopy(tree)
        self.leaves = self.tree.leaves()
        self.roots = self.tree.children
        if not self.roots:
            raise CriteriaError(f"'{self.tree.name}' has no children: a tree needs at least one "
                                "leaf below its top")
        self._place = {}        # phrase or path or name -> (leaf index, side or 0)
        names = [node.name for node in self.tree.walk()]
        for node in self.tree.walk():
            if names.count(node.name) > 1:
                raise CriteriaError(f"{node.path or node.name}: the name '{node.name}' occurs "
                                    "twice; names must be unique")
        for i, leaf in enumerate(self.leaves):
            for key, side in ((leaf.name, 0), (leaf.path, 0),
                              (leaf.positive, 1), (leaf.negative, -1)):
                if self._place.setdefault(key, (i, side)) != (i, side):
                    raise CriteriaError(f"{leaf.path}: '{key}' already stands for "
                                        f"{self.leaves[self._place[key][0]].path}; phrases and "
                                        "names must be unique")

    @classmethod
    def load(cls, path=DEFAULT_TREE):
        """Read a tree from a JSON file. Raises CriteriaError that names the file."""
        try:
            return cls(parse(read_text(path)))
        except (OSError, ValueError, RecursionError) as error:
            # a bad tree, a pipe, not UTF-8, not JSON, hundreds of levels
            raise CriteriaError(f"{path}: cannot read a criteria tree: {error}") from error

    def to_dict(self):
        """The tree as the dict it was made from (for checkpoints and exported folders)."""
        return copy.deepcopy(self._dict)

    def __deepcopy__(self, memo):
        return self             # nothing changes a tree: copies of a model share it

    def __len__(self):
        return len(self.leaves)

    def __str__(self):
        lines = [self.tree.name]
        for node in self.tree.walk():
            if node is not self.tree:
                lines.append("  " * (node.path.count("/") + 1) + node.name
                             + ("" if node.children else f": {node.positive} / {node.negative}"))
        return "\n".join(lines)

    def find(self, name):
        """The node with this name or path. Raises CriteriaError that lists what there is."""
        for node in self.tree.walk():
            if name and name in (node.name, node.path):
                return node
        raise CriteriaError(f"no dimension '{name}'; there are: "
                            + ", ".join(n.name for n in self.tree.walk()))

    def columns(self, names=None):
        """Indices, in `leaves`, of all leaves below the named nodes (one name, several; None: all):
        how a branch is chosen."""
        if names is None:
            return list(range(len(self)))
        names = [names] if isinstance(names, str) else names
        chosen = {leaf.path for name in names for leaf in self.find(name).leaves()}
        return [i for i, leaf in enumerate(self.leaves) if leaf.path in chosen]

    def select(self, names):
        """A smaller Criteria: only the named branches, with the dimensions above them."""
        keep = {self.leaves[i].name for i in self.columns(names)}
        if not keep:
            raise CriteriaError("no dimension was named; there are: "
                                + ", ".join(n.name for n in self.tree.walk()))

        def prune(tree):
            if "children" not in tree:
                return tree if tree["name"] in keep else None
            children = [child for child in map(prune, tree["children"]) if child]
            return {"name": tree["name"], "children": children} if children else None
        return Criteria(prune(self.to_dict()))

    def annotation(self, positive=(), negative=()):
        """Two lists (phrases, leaf names or paths) -> int8 array (leaves,). Raises CriteriaError on
        an unknown attribute, a phrase on the wrong side, or an attribute on both sides."""
        states = np.zeros(len(self), np.int8)
        for side, words in ((1, positive), (-1, negative)):
            if (not isinstance(words, (list, tuple))
                    or not all(isinstance(word, str) for word in words)):
                raise CriteriaError(f"attributes must be a list of strings, not {words!r}")
            for word in words:
                if word not in self._place:
                    raise CriteriaError(f"unknown attribute '{word}'; use a phrase or a leaf's "
                                        f"name, for example '{self.leaves[0].positive}' or "
                                        f"'{self.leaves[0].name}'")
                i, meant = self._place[word]
                if meant == -side:
                    raise CriteriaError(f"{self.leaves[i].path}: '{word}' is the other side's "
                                        "phrase; move it")
                if states[i] == -side:
                    raise CriteriaError(f"{self.leaves[i].path}: '{word}' is listed as positive "
                                        "and as negative; keep one")
                states[i] = side
        return states

    def prompt(self, caption, annotation=None):
        """Caption and annotation (leaves,) -> Prompt with the phrases A_pos and A_neg.
        None: the plain caption."""
        states = np.zeros(len(self), np.int8) if annotation is None else np.asarray(annotation)
        if states.shape != (len(self),) or not np.isin(states, (-1, 0, 1)).all():
            raise CriteriaError(f"an annotation is {len(self)} numbers of -1, 0, +1, "
                                f"not {states!r}")
        pairs = list(zip(self.leaves, states))
        return Prompt(caption, tuple(a.positive for a, s in pairs if s > 0),
                      tuple(a.negative for a, s in pairs if s < 0))


def _build(tree, above=()):
    """dict -> Node, checking each level. `above` are the dicts from the top to here."""
    names = [parent["name"] for parent in above]
    where = "/".join(names[1:] or names) or "the top"
    if not isinstance(tree, dict):
        raise CriteriaError(f"below {where}: a node is an object with a 'name', not {tree!r}")
    name = tree.get("name")
    if any(tree is parent for parent in above):
        raise CriteriaError(f"below {where}: '{name}' contains itself; a tree has no cycles")
    if not isinstance(name, str) or not name.strip() or "/" in name:
        raise CriteriaError(f"below {where}: the name {name!r} is empty or contains '/'")
    path = "/".join([*names, name][1:])
    here = path or name
    wrong = set(tree) - ({"name", "children"} if "children" in tree
                         else {"name", "positive", "negative"})
    if wrong:
        raise CriteriaError(f"{here}: a node has a name, and children or two phrases; remove "
                            f"{sorted(wrong, key=str)}")
    if "children" in tree:
        if not isinstance(tree["children"], list) or not tree["children"]:
            raise CriteriaError(f"{here}: 'children' must be a list that is not empty")
        return Node(name, path, tuple(_build(child, above + (tree,)) for child in tree["children"]))
    for side in ("positive", "negative"):
        if not isinstance(tree.get(side), str) or not tree[side].strip():
            raise CriteriaError(f"{here}: the pair has no '{side}' phrase; a leaf needs both")
    return Node(name, path, (), tree["positive"], tree["negative"])
