"""Whether a mesh can run a config: what it cannot split, and what would help."""

from jax.sharding import Mesh

from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.mesh import nearest_meshes

FLOAT8_CAPABILITY = 8, 9


def check_fits(config: Config, mesh: Mesh, training: bool = True) -> None:
    """Raise UserError where the mesh cannot split what is never padded: heads, experts and, where
    the model is trained, rows, layers and sequences.
    """
    sizes = dict(mesh.shape)
    if training and config.model.float8:
        _check_float8(mesh)
    wrong = _misfit(config, sizes, training)
    if wrong is None:
        return
    works = lambda sizes: _misfit(config, sizes, training) is None  # noqa: E731
    for devices in sorted(range(1, 2 * mesh.size), key=lambda n: abs(n - mesh.size)):
        if meshes := nearest_meshes(sizes, devices, count=1, works=works):
            raise UserError(f"{wrong}, or --mesh={meshes[0]}")


def _check_float8(mesh: Mesh) -> None:
    """Without float8 in the hardware XLA would multiply in another type, and say nothing."""
    device = next(mesh.devices.flat)
    capability = getattr(device, "compute_capability", None)
    if capability is not None and tuple(map(int, capability.split("."))) < FLOAT8_CAPABILITY:
        raise UserError(
            "model.float8 needs a GPU that multiplies in float8 (NVIDIA Ada, Hopper and newer), "
            f"and {device.device_kind} does not: leave it out"
        )


def _misfit(config: Config, sizes: dict[str, int], training: bool) -> str | None:
    """What does not divide evenly over a mesh of these sizes, and what would; None if all does."""
    model, tp, ep = config.model, sizes["tp"], sizes["ep"]
    if model.is_recurrent:
        return _recurrent_misfit(config, sizes, training)
    for key, heads in (("num_heads", model.num_heads), ("num_kv_heads", model.kv_heads)):
        if heads % tp:
            return f"model.{key}={heads} does not divide over tp={tp}: use a multiple of {tp}"
    if ep > 1 and model.experts is None:
        return f"ep={ep} splits experts, but the model has none: set model.experts.num_experts"
    if ep > 1 and model.experts.num_experts % ep:
        return (
            f"model.experts.num_experts={model.experts.num_experts} does not divide over ep={ep}: "
            f"use a multiple of {ep}"
        )
    return _training_misfit(config, sizes) if training else None


def _recurrent_misfit(config: Config, sizes: dict[str, int], training: bool) -> str | None:
    for axis in ("pp", "cp", "ep"):
        if sizes[axis] > 1:
            return (
                f"model.kind={config.model.kind} reads token after token, which "
                f"{axis}={sizes[axis]} cannot split: use dp, fsdp and tp"
            )
    return _rows_misfit(config, sizes["dp"] * sizes["fsdp"]) if training else None


def _training_misfit(config: Config, sizes: dict[str, int]) -> str | None:
    model, cp, pp = config.model, sizes["cp"], sizes["pp"]
    if model.kind == "encoder_decoder" and max(cp, pp) > 1:
        axis = f"cp={cp}" if cp > 1 else f"pp={pp}"
        return (
            f"{axis} cannot split model.kind=encoder_decoder, which has two stacks of layers and "
            "two kinds of rows: use dp, fsdp or tp"
        )
    if config.task == "masked_language_modelling" and cp > 1:
        return (
            f"cp={cp} splits rows, whose tokens to predict task={config.task} puts together: use "
            "dp, fsdp, tp or pp"
        )
    if config.seq_len % (2 * cp) and cp > 1:
        name = "data.seq_len" if config.data.seq_len else "model.max_seq_len"
        return (
            f"{name}={config.seq_len} does not divide into 2 x cp = {2 * cp} chunks: "
            f"use a multiple of {2 * cp}"
        )
    if cp > 1 and (model.attention_dropout or model.attention not in ("auto", "blocked")):
        return (
            f"cp={cp} splits rows, but model.attention={model.attention} with "
            f"model.attention_dropout={model.attention_dropout} needs whole ones: use attention="
            "auto without dropout on probabilities"
        )
    if cp > 1 and model.experts is not None and model.experts.capacity is not None:
        return (
            f"model.experts.capacity counts a row's tokens in order, but cp={cp} splits rows: "
            "leave capacity out"
        )
    if pp > 1 and model.float8:
        return (
            f"model.float8 scales what is multiplied at once, which pp={pp} would split: leave pp "
            "out of the mesh"
        )
    shards = sizes["dp"] * sizes["fsdp"] * sizes["ep"]
    rows = config.train.batch_size // config.train.fewest_parts // shards
    return _rows_misfit(config, shards) or (_pipeline_misfit(config, pp, rows) if pp > 1 else None)


def _rows_misfit(config: Config, shards: int) -> str | None:
    train, count = config.train, config.train.fewest_parts
    rows = train.batch_size // count
    if rows % shards:
        return (
            f"train.batch_size={train.batch_size} with train.accumulation={count} "
            f"makes micro-batches of {rows} rows, which do not divide over dp x fsdp x ep = "
            f"{shards}: use a multiple of {shards} rows"
        )
    return None


def _pipeline_misfit(config: Config, pp: int, rows: int) -> str | None:
    """What does not fit a pipeline of `pp` stages with `rows` rows on each device."""
    model, rounds, count = config.model, config.parallel.rounds, config.parallel.microbatches
    pattern = len(model.layer_pattern)
    if model.num_layers % (pp * rounds * pattern):
        parts = f"pp x parallel.rounds = {pp} x {rounds}"
        whole = f" of whole patterns of {pattern} layers" if pattern > 1 else ""
        return (
            f"model.num_layers={model.num_layers} does not divide over {parts} stages{whole}: "
            f"use a multiple of {pp * rounds * pattern}"
        )
    if rows < pp:
        return (
            f"{rows} rows on each device make fewer micro-batches than pp={pp} has stages: use "
            f"{pp // rows if pp % rows == 0 else -(-pp // rows)} times the train.batch_size"
        )
    if count is not None and (count < pp or rows % count):
        few = f"fewer than pp={pp} stages" if count < pp else f"no divisor of {rows} rows a device"
        choices = ", ".join(str(n) for n in range(pp, rows + 1) if rows % n == 0)
        return f"parallel.microbatches={count} is {few}: use one of {choices}"
    return None
