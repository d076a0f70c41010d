"""What other libraries make of given weights, run by `palette.py` in an interpreter that has the library.

    PEER_PYTHON benchmarks/palette_peers.py PLAN.json

PLAN names a safetensors file of a ResNet-20, one of images, the jobs and a folder; each job leaves a safetensors file
of the weights there. A job that the library cannot do is reported as such. The last line is one JSON object.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from weightfold.models import Classes, ImageInput, TaskSpec, build

Weights = dict[str, Tensor]


def resnet(weights: Weights) -> nn.Module:
    model = build("resnet20", TaskSpec(input=ImageInput(channels=3, height=32, width=32), output=Classes(n=10)))
    model.load_state_dict(weights, strict=False)
    return model.eval()


def coremltools_kmeans(weights: Weights, job: dict[str, Any], _: Weights) -> Weights:
    """`PostTrainingPalettizer`: k-means of each tensor, or of each group of output channels."""
    from coremltools.optimize.torch import palettization as P

    settings: dict[str, Any] = {"n_bits": job["bits"], "granularity": "per_tensor"}
    if job.get("group_size"):
        settings |= {"granularity": "per_grouped_channel", "group_size": job["group_size"]}
    config = P.PostTrainingPalettizerConfig.from_dict({"global_config": settings})
    return state(P.PostTrainingPalettizer(resnet(weights), config).compress(num_kmeans_workers=1))


def coremltools_sensitive(weights: Weights, job: dict[str, Any], images: Weights) -> Weights:
    """`SKMPalettizer`: k-means weighted by squared gradients, as in SqueezeLLM."""
    from coremltools.optimize.torch import palettization as P

    config = P.SKMPalettizerConfig.from_dict(
        {"global_config": {"n_bits": job["bits"]}, "calibration_nsamples": len(images["sensitive_x"])}
    )
    data = list(zip(images["sensitive_x"].split(1), images["sensitive_y"].split(1), strict=True))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    palettizer = P.SKMPalettizer(resnet(weights), config)
    return state(palettizer.compress(dataloader=data, loss_fn=loss, num_kmeans_workers=1, num_sensitivity_workers=1))


def coremltools_dkm(weights: Weights, job: dict[str, Any], images: Weights) -> Weights:
    """`DKMPalettizer` with its own settings, on every layer; batches and schedule as the arms of palette.py."""
    from coremltools.optimize.torch import palettization as P

    settings = {"n_bits": job["bits"], "milestone": 0, "weight_threshold": 0}
    palettizer = P.DKMPalettizer(resnet(weights), P.DKMPalettizerConfig.from_dict({"global_config": settings}))
    model = palettizer.prepare()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=job["lr"], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job["steps"])
    x, y = images[f"train_x_{job['seed']}"], images[f"train_y_{job['seed']}"]
    for xs, ys in zip(x.split(job["batch"]), y.split(job["batch"]), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(xs), ys).backward()
        optimizer.step()
        schedule.step()
        palettizer.step()
    return state(palettizer.finalize())


def torchao_intx(weights: Weights, job: dict[str, Any], _: Weights) -> Weights:
    """`IntxWeightOnlyConfig`, one scale a row; convolutions as linear layers of the same rows: torchao skips them."""
    import torchao.quantization as Q
    from torchao.quantization.granularity import PerAxis

    config = Q.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{job['bits']}"), granularity=PerAxis(0))
    return each_matrix(weights, lambda layer: Q.quantize_(layer, config))


def torchao_codebook(weights: Weights, job: dict[str, Any], _: Weights) -> Weights:
    """The prototype `codebook_weight_only`, scalar entries; rows of a multiple of 8 only: the stem stays dense."""
    import torchao.quantization as Q
    from torchao.prototype.quantization.codebook import codebook_weight_only

    config = codebook_weight_only(dtype=getattr(torch, f"uint{job['bits']}"), block_size=(1, 1))
    return each_matrix(weights, lambda layer: Q.quantize_(layer, config), multiple=8)


def each_matrix(weights: Weights, quantize: Any, multiple: int = 1) -> Weights:
    """Every weight of two or more dimensions as a linear layer, quantised and written out again."""
    out = dict(weights)
    for name, value in weights.items():
        rows = value.flatten(1) if value.ndim > 1 else value
        if value.ndim < 2 or rows.shape[1] % multiple:
            continue
        holder = nn.Sequential(nn.Linear(rows.shape[1], rows.shape[0], bias=False))
        holder[0].weight.data.copy_(rows)
        quantize(holder)
        quantised: Any = holder[0].weight
        out[name] = quantised.dequantize().detach().float().reshape(value.shape).clone()
    return out


def state(model: nn.Module) -> Weights:
    """Tensors of the names that a ResNet-20 has."""
    names = {n for n in model.state_dict() if not n.startswith("_")}
    own = resnet({}).state_dict()
    return {n: model.state_dict()[n].detach().contiguous().clone() for n in names & own.keys()}


JOBS = {
    job.__name__: job
    for job in (coremltools_kmeans, coremltools_sensitive, coremltools_dkm, torchao_intx, torchao_codebook)
}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    warnings.filterwarnings("ignore")
    torch.set_num_threads(plan["threads"])
    weights, images = load_file(plan["weights"]), load_file(plan["images"])
    done: list[dict[str, Any]] = []
    for number, job in enumerate(plan["jobs"]):
        torch.manual_seed(job.get("seed", 0))
        start = time.perf_counter()
        try:
            found = JOBS[job["kind"]](copy.deepcopy(weights), job, images)
            save_file(found, Path(plan["out"], f"{number}.safetensors"))
            done.append({"seconds": time.perf_counter() - start})
        except Exception as error:  # a library's refusal is a finding
            done.append({"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"})
    versions = {}
    for name in ("torch", "coremltools", "torchao"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    print(json.dumps({"done": done, "versions": versions}))


if __name__ == "__main__":
    main()
