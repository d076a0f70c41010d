"""Coverage of the channel graph: which architectures trace, what is free, and whether any admitted edit is wrong.

    python benchmarks/coverage.py [--workers 2] [--only PART] [--out FILE [--resume]] [--torch-pruning FILE]

For every architecture of `architectures.py` (random weights): trace and prove, as `Compressor.prepare` does, then in
float64 on every group every exactness check that its admitted edits allow: random permutation, rescale, sign; removal
of planted silent and unread channels; merging of planted duplicates; splitting. An edit is wrong when an output's
relative error exceeds 1e-9, or when anything is raised. "withdrawn" counts what the rules had admitted and the proof
refuted.

An architecture meets the goal when every output channel of its linear, convolutional and recurrent layers can be edited
(alone or as part of a head), apart from those that reach the model's output or are not used, every attention layer with
several heads has its heads free, and no edit was wrong. Where that is impossible for a reason of the architecture's own
(`BY_DESIGN`), it does not meet the goal and is counted apart. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-9
TIME_LIMIT_S = 600


def check_one(name: str) -> dict[str, Any]:
    """Trace one architecture and run every check on it."""
    import torch
    from architectures import by_name

    from weightfold.errors import WeightfoldError
    from weightfold.graph import exactness
    from weightfold.graph.proof import prepared
    from weightfold.graph.trace import trace

    architecture = by_name(name)
    model, args, kwargs = architecture.build()
    row: dict[str, Any] = {"name": name, "family": architecture.family}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    example = (tuple(args), dict(kwargs))
    started = time.perf_counter()
    try:
        graph = trace(model, example)
    except WeightfoldError as error:
        return {**row, "traced": False, "error": error.message[:300]}
    row["trace_s"] = round(time.perf_counter() - started, 3)
    graph = prepared(model, example, graph=graph)
    row["prepare_s"] = round(time.perf_counter() - started, 3)
    row["proved"] = without_folders(str(graph.proved))
    row["withdrawn"] = [without_folders(reason)[:240] for _, _, reason in graph.proved.withdrawn]
    row |= {"traced": True, **free_channels(model, graph)}
    model = model.double()
    doubled = _double(example)
    checks = []
    with exactness.float64():
        for group in graph:
            checks += exactness.check_group(model, graph, group.name, doubled, torch.Generator().manual_seed(0))
    wrong = [vars(c) for c in checks if not c.error <= TOLERANCE]
    errors = [c.error for c in checks if c.error <= TOLERANCE]
    row |= {"groups": len(graph), "checks": len(checks), "wrong": len(wrong), "worst": max(errors, default=0.0)}
    row["wrong_list"] = [{k: str(v)[:200] for k, v in w.items()} for w in wrong[:8]]
    row["goal"] = not row["locked"] and not row["headless"] and not wrong
    row["by_design"] = "" if row["goal"] or wrong else by_design(row)
    return row


def _double(example: Any) -> Any:
    import torch
    from torch.utils import _pytree as pytree

    return pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, example)


EXCUSED = (
    "reaches the model's output",
    "is not used by the traced forward",
    "is picked by data",
    "is picked out alone",
)


BY_DESIGN = {
    "hf-bloom": (r"self_attention$", "every head has a slope of its own (alibi), which the forward computes"),
    "hf-mpt": (r"attn$", "every head has a slope of its own (alibi), which the forward computes"),
    "hf-fnet": (r"(projection|output\.dense)\.weight$", "writes the stream, which a Fourier transform mixes"),
    "hf-videomae": (r"patch_embeddings\.projection\.weight$", "writes the stream, to which a fixed table is added"),
    "hf-recurrent-gemma": (r"k_proj\.weight$", "the one key of all heads, rotated by fixed angles"),
    "hand-mlp-mixer": (r"tokens\.2\.weight$", "writes positions of the image, which are data and no hidden units"),
}
"""What cannot be free in an architecture and why: a pattern for the tensors, or attention layers, that it concerns."""


def by_design(row: dict[str, Any]) -> str:
    """The reason, if it covers everything that is locked or without heads."""
    pattern, reason = BY_DESIGN.get(row["name"], ("$^", ""))
    found = [entry.partition("[")[0] for entry in (*row["locked"], *row["headless"])]
    return reason if all(re.search(pattern, name) for name in found) else ""


STREAM = ("hidden_size", "d_model", "n_embd", "dim")
"""A residual stream to which a fixed table of positions is added cannot be edited; it is no hidden layer."""


def free_channels(model: Any, graph: Any) -> dict[str, Any]:
    """Count output channels of weighted layers: free, frozen for good reasons, locked; and attention without heads."""
    free: dict[tuple[str, int], set[int]] = {}
    for group in graph:
        if group.free:
            for axis in group.axes:
                if axis.slabs == 1:
                    free.setdefault(axis.key, set()).update(axis.index[axis.index >= 0].tolist())
    excused = {(f.tensor, f.dim): f.reason for f in graph.frozen}
    n_free = n_locked = n_excused = 0
    stream = {getattr(getattr(model, "config", None), name, None) for name in STREAM}
    linear = {f"{p}.weight" for p, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    locked = []
    for tensor, dim, n in _writers(model, graph.shapes):
        have = len(free.get((tensor, dim), ()))
        reason = excused.get((tensor, dim), "")
        n_free += have
        if have == n or n < 2:
            continue
        if any(text in reason for text in EXCUSED) or (n in stream and tensor in linear and "fixed table" in reason):
            n_excused += n - have
        else:
            n_locked += n - have
            locked.append(without_folders(f"{tensor}[{dim}]: {n - have} of {n}: {reason}")[:240])
    return {
        "free": n_free,
        "excused": n_excused,
        "n_locked": n_locked,
        "locked": locked[:6],
        "headless": headless(model, graph)[:6],
        "removable_groups": sum("remove" in g.admits for g in graph),
        "mergeable_groups": sum("merge" in g.admits for g in graph),
        "heads": sum(g.n_channels for g in graph if g.kind == "blocks"),
    }


def without_folders(text: str) -> str:
    """Source files by their names alone."""
    return re.sub(r"(?<![\w.])/[\w./-]*/(?=[\w-]+\.py)", "", text)


def _writers(model: Any, shapes: dict[str, tuple[int, ...]]) -> Iterable[tuple[str, int, int]]:
    """The writing dimension of every weight of a linear, convolutional or recurrent layer."""
    from torch import nn

    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}".lstrip(".")
            if parameter.ndim < 2 or name not in shapes:
                continue
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd) or type(module).__name__ == "Conv1D"
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)) or transposed:
                dim = 1 if transposed else 0
                yield name, dim, shapes[name][dim]


HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "num_key_value_heads")
QUERY = re.compile(
    r"(^|_)(q|query|qkv|q_proj|q_lin|c_attn|Wqkv|query_key_value|qkv_proj|in_proj_weight|to_q|query_proj)$"
)


def headless(model: Any, graph: Any) -> list[str]:
    """Attention layers with several heads of which no group of heads is free."""
    free = [g for g in graph if g.free]
    out = []
    for path, module in model.named_modules():
        names = [n for n, _ in module.named_children()] + [n for n, _ in module.named_parameters(recurse=False)]
        heads = next((getattr(module, h) for h in HEADS if isinstance(getattr(module, h, None), int)), 0)
        used = any(key.startswith(f"{path}.") for key in graph.shapes)
        if heads < 2 or not used or not any(QUERY.search(n) for n in names):
            continue
        mine = [g for g in free if any(a.tensor.startswith(f"{path}.") for a in g.axes)]
        if not any(g.kind == "blocks" or g.n_channels == heads for g in mine):
            out.append(path)
    return out


def run_one(name: str) -> dict[str, Any]:
    """Check one architecture in a process of its own, one thread, under a time limit."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, timeout=TIME_LIMIT_S, env=env
        )
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"name": name, "traced": False, "error": f"no end after {TIME_LIMIT_S} s"}
    except (IndexError, json.JSONDecodeError):
        return {"name": name, "traced": False, "crashed": True, "error": done.stderr.strip()[-300:]}


def summary(rows: list[dict[str, Any]], torch_pruning: Path | None) -> dict[str, Any]:
    """The figures of the last line."""
    traced = [r for r in rows if r.get("traced")]
    free = sum(r["free"] for r in traced)
    total = free + sum(r["n_locked"] for r in traced)
    out = {
        "architectures": len(rows),
        "traced": len(traced),
        "wrong_edits": sum(r["wrong"] for r in traced),
        "withdrawn": sum(len(r["withdrawn"]) for r in traced),
        "proved": sum(r["proved"].startswith("not") is False for r in traced),
        "prepare_over_trace": round(median(r["prepare_s"] / r["trace_s"] for r in traced), 2) if traced else None,
        "free_share": round(free / max(total, 1), 5),
        "goal_met": sum(bool(r.get("goal")) for r in rows),
        "impossible_by_design": sum(bool(r.get("by_design")) for r in rows),
        "checks": sum(r["checks"] for r in traced),
        "worst_error": max((r["worst"] for r in traced), default=0.0),
        "torch_pruning_ok": None,
    }
    if torch_pruning is not None and torch_pruning.exists():
        found = json.loads(torch_pruning.read_text())
        checked = found.get("results", found.get("architectures", found))
        entries = checked.values() if isinstance(checked, dict) else checked
        names = {r["name"] for r in rows}
        out["torch_pruning_ok"] = sum(
            bool(e.get("ok")) for e in entries if isinstance(e, dict) and e.get("name") in names
        )
    return out


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    if not row.get("traced"):
        return f"{row['name']:32s} not traced: {row.get('error', '')[:110]}"
    mark = "ok" if row["goal"] else "==" if row["by_design"] else "--"
    found = "; ".join([*row["locked"][:1], *(f"no heads: {h}" for h in row["headless"][:1])])
    why = row["by_design"] or found
    return (
        f"{row['name']:32s} {mark} trace {row['trace_s']:5.2f} s  prepare {row['prepare_s']:5.1f} s "
        f" groups {row['groups']:3d}  free {row['free']:6d}  locked {row['n_locked']:4d}  heads {row['heads']:3d} "
        f" removable {row['removable_groups']:3d}  checks {row['checks']:4d}  wrong {row['wrong']:2d}  {why[:100]}"
    )


def save(path: Path, rows: list[dict[str, Any]], torch_pruning: Path | None) -> None:
    """Write what is known so far: a run that is cut off leaves its finished rows."""
    import torch

    import weightfold

    facts = {"python": platform.python_version(), "torch": torch.__version__, "weightfold": weightfold.__version__}
    text = json.dumps({"versions": facts, "summary": summary(rows, torch_pruning), "rows": rows}, indent=1) + "\n"
    text = without_folders(text)
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    draft.replace(path)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one")
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stride", type=int, default=1, help="check every n-th architecture only")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file already holds")
    parser.add_argument("--torch-pruning", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if options.one:
        print(json.dumps(check_one(options.one)))
        return
    from architectures import architectures

    names = [a.name for a in architectures() if options.only in a.name]
    names = names[:: options.stride] if options.stride > 1 else names
    rows = json.loads(options.out.read_text())["rows"] if options.resume else []
    names = [name for name in names if name not in {row["name"] for row in rows}]
    with ThreadPoolExecutor(options.workers) as pool:
        for row in pool.map(run_one, names):
            rows.append(row)
            print(line(row), flush=True)
            if options.out is not None:
                save(options.out, rows, options.torch_pruning)
    results = summary(rows, options.torch_pruning)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
