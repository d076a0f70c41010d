"""A network sharded by `fully_shard` changes its shape: gathered on the first rank, changed there, sharded again.

FSDP2 fixes the shape of every shard when it is made, so nothing can be edited in place. All values pass through the
first rank's memory, once there and once back; the other ranks only follow the structure. Cost: one gathering and one
broadcast of the model and of the optimiser's state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def change_sharded(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    build: Callable[[], nn.Module],
    optimize: Callable[[nn.Module], Optimizer],
    shard: Callable[[nn.Module], Any],
    change: Callable[[nn.Module, Optimizer], Any],
) -> tuple[nn.Module, Optimizer]:
    """Change the structure of a sharded network in mid-training; every rank calls this.

    What comes back replaces both arguments. A learning-rate scheduler holds the old optimiser: build it anew over the
    new one and load its state. Settings of the optimiser's groups come along.

    Args:
        model: as it is trained, sharded by `fully_shard`.
        build: makes the same network unsharded, with the widths that it has now.
        optimize: makes the optimiser of a network.
        shard: shards a network in place, as it was done at first.
        change: changes the whole network in place; the optimiser is to follow. The values count on the first rank; the
            others need the same shapes, which a `Compressor` with ``ranks=Ranks(WORLD)`` gives them.
    Returns:
        The new sharded network, and its optimiser.
    Example:
        Fold to half the channels, at once, in mid-training::

            def fold(whole, optimizer):
                c = Compressor(whole, example, [Fold(keep=0.5)], ranks=Ranks(torch.distributed.group.WORLD))
                c.prepare(optimizer)
                c.once(batches)
                c.convert()

            model, optimizer = change_sharded(
                model, optimizer,
                build=lambda: Net(width), optimize=lambda net: AdamW(net.parameters()), shard=fully_shard, change=fold,
            )
    """
    weights = get_model_state_dict(model, options=GATHER)
    moments = get_optimizer_state_dict(model, optimizer, options=GATHER)
    whole = build()
    own = optimize(whole)
    leads = dist.get_rank() == 0
    if leads:
        set_model_state_dict(whole, weights)
        set_optimizer_state_dict(whole, own, moments)
    change(whole, own)
    weights = get_model_state_dict(whole) if leads else {}
    moments = get_optimizer_state_dict(whole, own) if leads else {}
    shard(whole)
    fresh = optimize(whole)
    set_model_state_dict(whole, weights, options=SPREAD)
    set_optimizer_state_dict(whole, fresh, moments, options=SPREAD)
    return whole, fresh
