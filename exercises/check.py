"""What a check gives, written down and compared. A student's copy has this file too.

A check (probes.py) calls the exercise's function on random inputs and returns {name: value}. Each
value is *recorded* as its kind (dtype and shape, or the words themselves) and its numbers. Nothing
is compared with a formula: what is expected is what the reference gave on the same inputs.
"""
import math

import numpy as np
import torch

from .probes import CHECKS, Draw

# How near two numbers of one kind must be, relative to the largest: other algebra rounds otherwise.
TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
BLANK = "exercise {}: "                      # how a stub's NotImplementedError begins


def record(value):
    """Any value of a check -> (kind, numbers)."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value))
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64)
    if not torch.is_tensor(value):
        return [str(value), []]              # words, None, a list of words
    kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return [kind, value.detach().double().flatten().tolist()]


def outcome(number, name, seed):
    """{name: [kind, numbers]} of one check, with what the project's files hold now. An error of the
    function is an outcome too; that of another exercise's stub is {"waits": its number}."""
    draw = Draw(f"{seed} {number} {name}")
    torch.manual_seed(draw.whole(0, 10 ** 6))
    try:
        return {key: record(value) for key, value in CHECKS[number][name].run(draw).items()}
    except Exception as error:               # whatever a student's line may raise
        text = str(error).strip().split("\n")[0][:150]
        if isinstance(error, NotImplementedError) and text.startswith(BLANK[:9]):
            return {"waits": [text[9:].split(":")[0], []]}
        return {"error": [f"{type(error).__name__}: {text}", []]}


def _near(a, b, kind, scale):
    return (a == b or math.isnan(a) and math.isnan(b)
            or abs(a - b) <= TOLERANCE.get(kind.split()[0], 0) * scale)


def _agree(yours, expected):
    finite = [abs(x) for x in expected[1] if math.isfinite(x)]
    return (yours[0] == expected[0] and len(yours[1]) == len(expected[1]) and all(
        _near(a, b, expected[0], max(finite, default=0)) for a, b in zip(yours[1], expected[1])))


def wrong_key(yours, expected):
    """The first value that is not as expected, or None. What is there besides is no fault."""
    if "error" in yours:
        return "error"
    return next((key for key, value in expected.items()
                 if key not in yours or not _agree(yours[key], value)), None)


def fingerprint(out):
    """An outcome as {name: [kind, two numbers]}: enough to know it again, too little to copy."""
    prints = {}
    for key, (kind, numbers) in out.items():
        odd = "" if all(map(math.isfinite, numbers)) else " not finite"
        numbers = [x if math.isfinite(x) else 0.0 for x in numbers]
        prints[key] = [kind + odd, [sum(x * math.cos(i + 1) for i, x in enumerate(numbers)),
                                    sum(map(abs, numbers))]]
    return prints


def _same_print(a, b):
    return a.keys() == b.keys() and all(
        a[k][0] == b[k][0] and all(_near(x, y, a[k][0], max(a[k][1][1], 1e-300))
                                   for x, y in zip(a[k][1], b[k][1])) for k in a)


def hint_of(name, outs, wrongs):
    """The hint of the one known wrong solution that gives what these outcomes {check: outcome} are
    at the check `name`; of several, of the one that agrees at the most other checks. None where
    none or no single one does: a hint is never a guess."""
    prints = {check: fingerprint(out) for check, out in outs.items()}
    score = {wrong["hint"]: sum(_same_print(wrong["prints"][check], prints[check])
                                for check in prints if check in wrong["prints"])
             for wrong in wrongs if name in wrong["prints"]
             and _same_print(wrong["prints"][name], prints[name])}
    best = [hint for hint, count in score.items() if count == max(score.values())]
    return best[0] if len(best) == 1 else None


def difference(yours, expected):
    """One fact that tells two recorded values apart: shape, dtype, sign, a constant ratio; else
    the place of the largest difference."""
    if yours[0] != expected[0]:
        return ("the dtype or the shape differs" if expected[1] and yours[1]
                else "something else altogether")
    pairs = list(zip(yours[1], expected[1]))
    if not all(math.isfinite(a) for a, _ in pairs):
        return "some of yours are not finite"
    if _agree([yours[0], [-a for a in yours[1]]], expected):
        return "the sign is the other one"
    a, b = max(pairs, key=lambda pair: abs(pair[1]))
    if b and a and _agree([yours[0], [x * b / a for x in yours[1]]], expected):
        return f"yours is {a / b:.6g} times what is expected, everywhere"
    at = max(range(len(pairs)), key=lambda i: abs(pairs[i][0] - pairs[i][1]))
    same = sum(_near(a, b, expected[0], abs(b)) for a, b in pairs)
    return f"{same} of {len(pairs)} values agree; the largest difference is at number {at + 1}"


def _show(value):
    numbers = ", ".join(f"{x:.6g}" for x in value[1][:4]) + (", ..." if len(value[1]) > 4 else "")
    return f"{value[0][:200]} {numbers}".strip()


def complaint(name, outs, expected, wrongs, asks):
    """None where the outcome outs[name] is as expected, else at most six lines: what was asked,
    yours, expected, and a hint or a fact."""
    yours = outs[name]
    key = "waits" if "waits" in yours else wrong_key(yours, expected)
    if key is None:
        return None
    lines = [f"asked    {asks}"]
    if key == "waits":
        return "\n".join(lines + [f"yours    nothing yet: exercise {yours['waits'][0]} is empty"])
    mine = yours.get(key, ["nothing of this name", []])
    lines += [f"yours    {key}: {_show(mine)}"]
    if key != "error":
        lines += [f"expected {key}: {_show(expected[key])}"]
    hint = hint_of(name, outs, wrongs)
    if hint:
        lines += [f"hint     {hint}"]
    elif key != "error":
        lines += [f"fact     {difference(mine, expected[key])}"]
    return "\n".join(lines)
