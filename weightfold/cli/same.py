"""`weightfold same`: are two models the same function by symmetry."""

from __future__ import annotations

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.inputs import Data, Shapes
from weightfold.cli.pairs import First, Maker, RawLogits, Second, open_one

DIFFERENT = 1


@guarded
def same(
    a: First,
    b: Second,
    model: Maker = None,
    example: Shapes = None,
    data: Data = None,
    raw_outputs: RawLogits = False,
    as_json: Json = False,
) -> None:
    """Say whether two models are the same, whatever the order, scale and sign of their channels; exit code 1 if not."""
    from weightfold.weights.canon import TOLERANCE, hash_distance, semantic_hash
    from weightfold.weights.compare import differences, weights_of

    (one, inputs), (two, others) = (open_one(spec, model, example, data) for spec in (a, b))
    texts = [semantic_hash(m, x, centre_logits=not raw_outputs) for m, x in ((one, inputs), (two, others))]
    apart = hash_distance(*texts)
    equal = apart <= TOLERANCE
    differ = differences(weights_of(one), weights_of(two))
    bytewise = not differ and all(bool((x == weights_of(two)[n]).all()) for n, x in weights_of(one).items())
    if as_json:
        facts = {"same": equal, "identical": bytewise, "distance": apart, "tolerance": TOLERANCE, "differences": differ}
        show.print_json({**facts, "hashes": texts})
    elif bytewise:
        show.console().print("identical: every weight is equal")
    elif equal:
        show.console().print(f"same by symmetry: sketches differ by {apart:.1e}, rounding is {TOLERANCE:.0e}")
    elif differ:
        show.console().print(f"different architectures: {show.plain('; '.join(differ[:5]))}")
    elif apart == float("inf"):
        show.console().print("different architectures: the same shapes, other operators")
    else:
        show.console().print(f"different: sketches differ by {apart:.1e}, rounding is {TOLERANCE:.0e}")
    if not equal:
        raise typer.Exit(DIFFERENT)
