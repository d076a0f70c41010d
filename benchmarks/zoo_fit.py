"""Fit the weights with which `weightfold.zoo.kin.kinship` tells parents; writes `weightfold/zoo/kin/fitted.py`.

    python benchmarks/zoo_fit.py [--cache FOLDER] [--out weightfold/zoo/kin/fitted.py]

Zoos of known parents (`zoo_families`): mlp and cnn, recipe mixed, seeds 100 to 109, recipe alike, seeds 100 to 103;
slim and tanh, recipe mixed, seeds 100 to 102. Of each family also two random halves, in which a model whose parent is
missing comes from its nearest ancestor that is there. Logistic regression on pairs of possible parents of which one is
the parent; its penalty is chosen by leaving out the first two seeds. Confidence: logistic regression on seeds 110 and
111, which the rest did not see. Nothing here looks at the seeds of `benchmarks/zoo.py` (0 to 9). Takes half an hour.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import zoo_families

from weightfold.weights.point import points
from weightfold.weights.symmetry import symmetries
from weightfold.zoo.kin import kinship, tree
from weightfold.zoo.kin.kinship import Kin

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)
USED = [(k, "mixed", s) for k in ("mlp", "cnn") for s in range(100, 110)]
USED += [(k, "alike", s) for k in ("mlp", "cnn") for s in range(100, 104)]
USED += [(k, "mixed", s) for k in ("slim", "tanh") for s in range(100, 103)]
HELD = [(k, "mixed", s) for k in ("mlp", "cnn") for s in (110, 111)]
Family = tuple[Kin, list[int | None]]


def grown(
    kind: str, recipe: str, seed: int, cache: Path | None
) -> list[tuple[dict[str, torch.Tensor], int, int | None]]:
    """Weights, family and parent of each network of a zoo."""
    file = None if cache is None else cache / f"{kind}_{recipe}_{seed}.pt"
    if file is not None and file.is_file():
        return [row[:3] for row in torch.load(file)]
    zoo = [(dict(g.model.state_dict()), g.family, g.parent) for g in zoo_families.zoo(kind, recipe, seed)]
    if file is not None:
        torch.save(zoo, file)
    return zoo


def measured(kind: str, recipe: str, seed: int, cache: Path | None, halves: int) -> list[Family]:
    """Families of a zoo, measured, with parents numbered within; and random halves of them."""
    zoo = grown(kind, recipe, seed, cache)
    found = symmetries(zoo_families.made(kind, 0), zoo_families.example(kind))
    generator = np.random.default_rng(seed)
    out: list[Family] = []
    for family in sorted({f for _, f, _ in zoo}):
        mine = [i for i, row in enumerate(zoo) if row[1] == family]
        parts = kinship.matrices(points(found, [zoo[i][0] for i in mine]))
        up = {i: zoo[i][2] for i in mine}
        for kept in [mine] + [
            sorted(generator.choice(mine, len(mine) // 2, replace=False).tolist()) for _ in range(halves)
        ]:
            at = [mine.index(i) for i in kept]
            out.append((kinship.kin([part[at] for part in parts]), [_ancestor(i, up, kept) for i in kept]))
    return out


def _ancestor(i: int, up: dict[int, int | None], kept: list[int]) -> int | None:
    a = up[i]
    while a is not None and a not in kept:
        a = up[a]
    return None if a is None else kept.index(a)


def pairs(families: list[Family]) -> tuple[np.ndarray, np.ndarray]:
    """Features of pairs of possible parents of which one is the parent, and whether it is the second."""
    rows, labels = [], []
    for found, parents in families:
        for x, parent in enumerate(parents):
            if parent is None:
                continue
            for other in found.near[x]:
                if other != parent and parent in found.near[x]:
                    a, b = sorted((parent, other), key=lambda i: found.size[0, i])
                    rows.append(kinship.features(found, x, a, b))
                    labels.append(b == parent)
    return np.array(rows), np.array(labels)


def fit(rows: np.ndarray, labels: np.ndarray, penalty: float) -> None:
    """Put the weights of a logistic regression into the module that `kinship` reads."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = rows.mean(0), rows.std(0) + 1e-9
    model = LogisticRegression(C=penalty, max_iter=5000).fit((rows - mean) / scale, labels)
    tree.fitted.MEAN, tree.fitted.SCALE = tuple(mean), tuple(scale)
    tree.fitted.WEIGHT, tree.fitted.BIAS = tuple(model.coef_[0]), float(model.intercept_[0])


def fit_root(families: list[Family]) -> None:
    """Weights of the softmax over a family's members that names the root."""
    from scipy.optimize import minimize

    tables = [(kinship.root_features(f), p.index(None)) for f, p in families if p.count(None) == 1]

    def loss(w: np.ndarray) -> float:
        values = [(t @ w, r) for t, r in tables]
        return float(np.mean([np.logaddexp.reduce(v) - v[r] for v, r in values]) + 1e-3 * w @ w)

    tree.fitted.ROOT = tuple(minimize(loss, np.zeros(4), method="BFGS").x)


def right(families: list[Family]) -> tuple[np.ndarray, np.ndarray]:
    """Features of the confidence of each edge told, and whether its parent is the true one."""
    rows, good = [], []
    for found, parents in families:
        scores = tree.scores_of(found)
        for x, a in enumerate(tree.told(found)[0]):
            if a is not None:
                rows.append(tree.confidence_features(scores[x], a))
                good.append(a == parents[x])
    return np.array(rows), np.array(good)


def fit_confidence(families: list[Family]) -> None:
    from sklearn.linear_model import LogisticRegression

    rows, good = right(families)
    model = LogisticRegression(C=10.0, max_iter=5000).fit(rows[:, 1:], good)
    tree.fitted.CONFIDENCE = (float(model.intercept_[0]), *model.coef_[0])


def share(families: list[Family]) -> float:
    """Share of edges told right, of families whose root is among them, over all members but roots."""
    good = total = 0
    for found, parents in families:
        said = tree.told(found)[0]
        good += sum(a == p for a, p in zip(said, parents, strict=True) if p is not None)
        total += sum(p is not None for p in parents)
    return good / total


def write(path: Path) -> None:
    lines = [
        '"""Numbers fitted by `benchmarks/zoo_fit.py`; see there for what on."""',
        "",
        "from __future__ import annotations",
        "",
    ]
    for name in ("MEAN", "SCALE", "WEIGHT", "ROOT", "CONFIDENCE"):
        values = ", ".join(f"{v:.6g}" for v in getattr(tree.fitted, name))
        lines.append(f"{name}: tuple[float, ...] = ({values})")
    lines.append(f"BIAS: float = {tree.fitted.BIAS:.6g}")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder for trained zoos")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "weightfold" / "zoo" / "kin" / "fitted.py"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    used = {key: measured(*key, options.cache, 2) for key in USED}
    fit_root([f for fs in used.values() for f in fs])
    part = pairs([f for key, fs in used.items() if key[2] > 101 for f in fs])
    left = [f for key, fs in used.items() if key[2] <= 101 and key[1] == "mixed" for f in fs[::3]]
    shares = {}
    for penalty in PENALTIES:
        fit(*part, penalty)
        shares[penalty] = share(left)
        print(f"penalty {penalty}: {shares[penalty]:.3f} of the parents right on seeds left out", flush=True)
    fit(*pairs([f for fs in used.values() for f in fs]), max(shares, key=lambda p: shares[p]))
    held = {key: measured(*key, options.cache, 1) for key in HELD}
    fit_confidence([f for fs in held.values() for f in fs])
    for key, families in held.items():
        print(key, f"parents right {share(families[::2]):.3f}, in halves {share(families[1::2]):.3f}")
    write(options.out)


if __name__ == "__main__":
    main()
