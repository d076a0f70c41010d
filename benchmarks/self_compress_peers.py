"""What other libraries make of the dense network of a bed: bytes and accuracy, each in an interpreter that has it.

    python benchmarks/self_compress_peers.py --bed lenet-300-100 --peer-python PATH [--peer-python PATH ...]
        [--seeds 2] [--steps 2000] [--paper FILE ...] [--shared ../shared/data] [--cache FOLDER] [--out FILE]
    python benchmarks/self_compress_peers.py --show FILE

    torchao, n bits          `IntxWeightOnlyConfig`, one scale a row; filters as rows of a matrix: torchao skips them
    coremltools, n bits      `PostTrainingPalettizer`: k-means of each tensor, no training
    brevitas, n bits         `QuantLinear`, `QuantConv2d` with learned per-row scales, trained on from the dense network
    brevitas, learned bits   the same with one learned whole width (2 at least) per tensor, and a penalty on the widths

Each job leaves the weights, which this script puts in the network and measures as every other arm. Bytes are counted,
as no library writes such a file: packed codes, a half-precision scale a row (coremltools: the palette in half precision
for each tensor), half-precision biases, 8 bytes a layer and 16 for the file; *coded* codes as in
`baselines/paper_self_compression.py`, one table a tensor. Activations stay floating point. No peer removes anything.

Rows of `baselines/paper_self_compression.py` (files of what it prints) join the table through --paper. The last line is
one JSON object; --out writes it with settings and versions, beside the other beds that the file holds. --show prints
the tables of such a file.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.baselines.paper_self_compression import BIAS_BITS, FILE_BYTES, LAYER_BYTES, STEP_BITS, coded_bytes
from benchmarks.compress_beds import NAMES, SHARED, Bed, open_bed, train_dense

Weights = dict[str, Tensor]
Job = dict[str, Any]
JOBS: dict[str, list[Job]] = {
    "torchao": [{"kind": "torchao_intx", "bits": bits} for bits in (8, 4, 2)],
    "coremltools": [{"kind": "coremltools_kmeans", "bits": bits} for bits in (4, 3, 2)],
    "brevitas": [
        *({"kind": "brevitas_fixed", "bits": bits} for bits in (4, 3, 2)),
        *({"kind": "brevitas_learned", "bits": 4, "penalty": penalty} for penalty in (0.01, 0.1)),
    ],
}
WIDTH_PREFIX, SCALE_PREFIX = "width of ", "scale of "


# in the peer's interpreter --------------------------------------------------------------------------------------------


def torchao_intx(bed: Bed, weights: Weights, job: Job) -> Weights:
    """Every matrix as a linear layer, quantised and written out again, with its scales."""
    import torchao.quantization as Q
    from torchao.quantization.granularity import PerAxis

    del bed
    config = Q.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{job['bits']}"), granularity=PerAxis(0))
    out = dict(weights)
    for name, value in weights.items():
        if value.ndim < 2:
            continue
        rows = value.flatten(1)
        holder = nn.Sequential(nn.Linear(rows.shape[1], rows.shape[0], bias=False))
        holder[0].weight.data.copy_(rows)
        Q.quantize_(holder, config)
        quantised: Any = holder[0].weight
        out[name] = quantised.dequantize().detach().float().reshape(value.shape).clone()
        out[SCALE_PREFIX + name] = quantised.scale.detach().float().flatten().clone()
    return out


def coremltools_kmeans(bed: Bed, weights: Weights, job: Job) -> Weights:
    from coremltools.optimize.torch import palettization as P

    model = dense(bed, weights)
    config = {"global_config": {"n_bits": job["bits"], "granularity": "per_tensor"}}
    palettizer = P.PostTrainingPalettizer(model, P.PostTrainingPalettizerConfig.from_dict(config))
    found = palettizer.compress(num_kmeans_workers=1).state_dict()
    return {name: found[name].detach().contiguous().clone() for name in weights}


def brevitas_fixed(bed: Bed, weights: Weights, job: Job) -> Weights:
    return brevitas(bed, weights, job, {})


def brevitas_learned(bed: Bed, weights: Weights, job: Job) -> Weights:
    return brevitas(bed, weights, job, {"weight_bit_width_impl_type": "parameter"})


def brevitas(bed: Bed, weights: Weights, job: Job, settings: dict[str, Any]) -> Weights:
    """Quantised layers in the place of the dense ones, trained on with the bed's own batches."""
    from brevitas.loss import WeightBitWidthWeightedBySize
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloat

    settings = {
        "weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": job["bits"],
        "weight_scaling_impl_type": "parameter_from_stats", **settings,
    }  # fmt: skip
    model = dense(bed, weights)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            new = QuantLinear(module.in_features, module.out_features, bias=module.bias is not None, **settings)
        elif isinstance(module, nn.Conv2d):
            sizes = {k: getattr(module, k) for k in ("stride", "padding", "dilation", "groups")}
            bias = module.bias is not None
            new = QuantConv2d(
                module.in_channels, module.out_channels, module.kernel_size, bias=bias, **sizes, **settings
            )
        else:
            continue
        new.load_state_dict(module.state_dict(), strict=False)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    model.train()
    widths = WeightBitWidthWeightedBySize(model) if "penalty" in job else None
    of_bits = [p for n, p in model.named_parameters() if "bit_width" in n]
    others = [p for n, p in model.named_parameters() if "bit_width" not in n]
    groups = [{"params": p, "lr": lr} for p, lr in ((others, job["lr"]), (of_bits, 0.01)) if p]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=job["steps"])
    for x, y in bed.batches(100 + job["seed"], job["steps"]):
        optimizer.zero_grad()
        loss = bed.loss(model(x), y)
        if widths is not None:
            loss = loss + job["penalty"] * widths.retrieve()
            widths.zero_accumulated_values()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    out = {name: value.detach().clone() for name, value in model.state_dict().items() if name in weights}
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantConv2d):
            quantised = module.quant_weight()
            out[f"{path}.weight"] = quantised.value.detach().clone()
            out[f"{SCALE_PREFIX}{path}.weight"] = quantised.scale.detach().flatten().clone()
            out[f"{WIDTH_PREFIX}{path}.weight"] = quantised.bit_width.detach().reshape(1).clone()
    return out


def dense(bed: Bed, weights: Weights) -> nn.Module:
    model = bed.make(0)
    model.load_state_dict({n: v for n, v in weights.items() if " " not in n}, strict=False)
    return model.eval()


KINDS = {job.__name__: job for job in (torchao_intx, coremltools_kmeans, brevitas_fixed, brevitas_learned)}


def work(plan: dict[str, Any]) -> None:
    """Do the jobs of a plan; what a library refuses is reported as such. The last line is JSON."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(plan["threads"])
    bed = open_bed(plan["bed"], Path(plan["shared"]), tune=plan["tune"], cache=Path(plan["cache"]))
    weights = load_file(plan["weights"])
    done: list[dict[str, Any]] = []
    for number, job in enumerate(plan["jobs"]):
        torch.manual_seed(job["seed"])
        start = time.process_time()
        try:
            found = KINDS[job["kind"]](bed, copy.deepcopy(weights), job)
            save_file({n: v.contiguous() for n, v in found.items()}, Path(plan["out"], f"{number}.safetensors"))
            done.append({"seconds": round(time.process_time() - start, 1)})
        except Exception as error:  # a library's refusal is a finding
            done.append({"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"})
    print(json.dumps({"done": done}))


# here -----------------------------------------------------------------------------------------------------------------


def compare(
    bed: Bed, seed: int, model: nn.Module, pythons: list[str], *, shared: Path, cache: Path, steps: int = 2000,
    lr: float = 3e-4, threads: int = 1, tune: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of every peer that one of the interpreters has.

    Args:
        model: the trained dense network.
        pythons: paths of interpreters.
        cache: folder of decoded images, which the peers read.
        steps: of training, for the arms that train on.
    """
    rows, found = [], versions(pythons)
    for name, jobs in JOBS.items():
        if name not in found:
            rows.append({"name": name, "seed": seed, "error": "absent: no --peer-python has it"})
            continue
        python, version = found[name]
        full = [{**job, "seed": seed, "steps": steps, "lr": lr} for job in jobs]
        rows += [{**row, "version": version} for row in ask(bed, model, python, full, shared, cache, threads, tune)]
    return rows


def versions(pythons: list[str]) -> dict[str, tuple[str, str]]:
    """Interpreter and version of every peer."""
    found: dict[str, tuple[str, str]] = {}
    for python in pythons:
        for name in JOBS:
            code = f"import importlib.metadata as m; print(m.version({name!r}))"
            asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
            if asked.returncode == 0:
                found.setdefault(name, (python, asked.stdout.strip()))
    return found


def ask(
    bed: Bed, model: nn.Module, python: str, jobs: list[Job], shared: Path, cache: Path, threads: int, tune: bool
) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        plan = {
            "bed": bed.name, "shared": str(shared.resolve()), "cache": str(cache.resolve()), "threads": threads,
            "tune": tune, "jobs": jobs, "weights": f"{folder}/weights.safetensors", "out": folder,
        }  # fmt: skip
        save_file({n: v.contiguous() for n, v in model.state_dict().items()}, plan["weights"])
        Path(folder, "plan.json").write_text(json.dumps(plan))
        done = subprocess.run([python, __file__, "--plan", f"{folder}/plan.json"], capture_output=True, text=True)
        if done.returncode:
            yield {"name": jobs[0]["kind"], "error": (done.stderr.strip().splitlines() or ["no word"])[-1]}
            return
        outcomes = json.loads(done.stdout.strip().splitlines()[-1])["done"]
        for number, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True)):
            row = {"bed": bed.name, "name": label(job), "bits": job["bits"], "seed": job["seed"], **outcome}
            if "error" not in outcome:
                row |= measured(bed, job, load_file(Path(folder, f"{number}.safetensors")))
            yield row


def label(job: Job) -> str:
    library = job["kind"].split("_")[0]
    if "penalty" in job:
        return f"{library}, learned bits, penalty {job['penalty']}"
    return f"{library}, {job['bits']} bits"


def measured(bed: Bed, job: Job, weights: Weights) -> dict[str, Any]:
    """Accuracy of the weights with half-precision scales, palettes and biases, and the bytes that they take."""
    packed, coded, widths, n_weights = FILE_BYTES, FILE_BYTES, 0.0, 0
    state = {}
    for name, value in weights.items():
        if " " in name:
            continue
        state[name] = value.half().float() if value.is_floating_point() else value
        if value.ndim < 2:
            packed += value.numel() * BIAS_BITS // 8
            coded += value.numel() * BIAS_BITS // 8
            continue
        bits = int(weights.get(WIDTH_PREFIX + name, torch.tensor([job["bits"]])).item())
        codes, values, side_bits = coded_tensor(value, weights.get(SCALE_PREFIX + name), bits)
        state[name] = values
        side = LAYER_BYTES + math.ceil(side_bits / 8)
        packed += side + math.ceil(value.numel() * bits / 8)
        coded += side + coded_bytes(codes.flatten().numpy(), bits)
        widths, n_weights = widths + bits * value.numel(), n_weights + value.numel()
    return {
        "accuracy": round(bed.accuracy(dense(bed, state)), 3),
        "mean_bits": round(widths / n_weights, 3),
        "packed_bytes": packed,
        "coded_bytes": coded,
        "weights_kept": 1.0,
    }


def coded_tensor(value: Tensor, scale: Tensor | None, bits: int) -> tuple[Tensor, Tensor, int]:
    """Codes from 0 below 2**bits, the values that they and half-precision side information give, bits of the latter."""
    if scale is None:
        palette, codes = value.half().unique(return_inverse=True)
        if len(palette) > 2**bits:
            raise SystemExit(f"A palette of {bits} bits holds {len(palette)} values.")
        return codes, palette[codes].float(), 16 * 2**bits
    scale = scale.view(-1, *[1] * (value.ndim - 1))
    numbers = (value / scale).round()
    low = -(2 ** (bits - 1))
    if numbers.min() < low or numbers.max() >= -low:
        raise SystemExit(f"Codes from {numbers.min()} to {numbers.max()} do not fit into {bits} bits.")
    return (numbers - low).long(), numbers * scale.half().float(), STEP_BITS * len(scale)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of each arm."""
    out = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        good = [row for row in mine if "error" not in row]
        if not good:
            out.append({"name": name, "error": mine[0]["error"]})
            continue
        entry: dict[str, Any] = {"name": name, "seeds": len(good)}
        for key in ("accuracy", "packed_bytes", "coded_bytes", "weights_kept", "seconds"):
            entry[f"{key}_mean"] = round(statistics.mean(row[key] for row in good), 3)
        if len(good) > 1:
            entry["accuracy_sd"] = round(statistics.stdev(row["accuracy"] for row in good), 3)
        out.append(entry)
    return out


def table(entries: list[dict[str, Any]]) -> str:
    lines = [f"{'':44}{'accuracy':>10}{'packed':>10}{'coded':>10}{'kept':>8}{'CPU s':>8}"]
    for e in entries:
        if "error" in e:
            lines.append(f"{e['name']:44}{e['error']}")
            continue
        numbers = e["accuracy_mean"], e["packed_bytes_mean"], e["coded_bytes_mean"]
        tail = f"{e['weights_kept_mean']:8.3f}{e['seconds_mean']:8.0f}"
        lines.append(f"{e['name']:44}{numbers[0]:10.2f}{numbers[1]:10.0f}{numbers[2]:10.0f}{tail}")
    return "\n".join(lines)


def paper_rows(files: list[Path], bed: str) -> list[dict[str, Any]]:
    """Rows that the baseline printed for a bed, named by penalty and gamma."""
    found = [row for file in files for row in json.loads(file.read_text().strip().splitlines()[-1])["rows"]]
    return [{"name": f"paper, {r['size']}, gamma {r['gamma']}", **r} for r in found if r["bed"] == bed]


def dense_row(bed: Bed, seed: int, model: nn.Module, seconds: float) -> dict[str, Any]:
    return {
        "bed": bed.name,
        "name": "dense",
        "bits": 32,
        "seed": seed,
        "seconds": round(seconds, 1),
        "accuracy": round(bed.accuracy(model), 3),
        "mean_bits": 32,
        "packed_bytes": bed.fp32_bytes,
        "coded_bytes": bed.fp32_bytes,
        "weights_kept": 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=NAMES, default="lenet-300-100")
    parser.add_argument("--peer-python", action="append", default=[], help="an interpreter that has a peer; repeatable")
    parser.add_argument("--steps", type=int, default=2000, help="of training on, for the arms that do")
    parser.add_argument("--lr", type=float, default=3e-4, help="of training on")
    parser.add_argument("--dense-steps", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--cache", type=Path, help="folder that keeps decoded images for the next time")
    parser.add_argument("--tune", action="store_true", help="measure on training samples held out")
    parser.add_argument("--paper", type=Path, nargs="*", default=[], help="what the paper's baseline printed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path, help="print the tables of a file of results")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan:
        work(json.loads(args.plan.read_text()))
        return
    if args.show:
        for name, result in json.loads(args.show.read_text()).items():
            print(f"{name}\n{table(result['summary'])}\n")
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        cache = args.cache or Path(folder)
        bed = open_bed(args.bed, args.shared, tune=args.tune, cache=cache)
        rows: list[dict[str, Any]] = []
        for seed in range(args.seeds):
            model, seconds = train_dense(bed, seed, args.dense_steps)
            rows.append(dense_row(bed, seed, model, seconds))
            settings = {"steps": args.steps, "lr": args.lr, "threads": args.threads, "tune": args.tune}
            rows += compare(bed, seed, model, args.peer_python, shared=args.shared, cache=cache, **settings)
    rows += paper_rows(args.paper, args.bed)
    entries = summary(rows)
    print(table(entries))
    result = {
        "bed": args.bed,
        "summary": entries,
        "rows": rows,
        "settings": {"steps": args.steps, "lr": args.lr, "dense_steps": args.dense_steps or bed.schedule.steps},
        "threads": args.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
    }
    if args.out:
        held = json.loads(args.out.read_text()) if args.out.is_file() else {}
        args.out.write_text(json.dumps({**held, args.bed: result}, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
